"""Transcriptions: the characters, their encoder, and the attention of pixels to them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.conditioning.characters import character_ids
from imagen_core.models.conditioning.transcription import TranscriptionConfig, TranscriptionEncoder
from imagen_core.models.conditioning.transcription_attention import TranscriptionAttention
from imagen_core.models.layers.attention import flatten_pixels
from imagen_core.models.layers.context import Context
from imagen_core.models.presets.hybrid import HYBRID_PRESETS
from tests.imagen_core.models.small import FAMILIES, NO_EFFECT, inputs, random_weights

WRITING = {"dim": 24, "depth": 2, "head_dim": 8, "max_characters": 12, "resolutions": (8,)}
FAMILY = pytest.mark.parametrize("family", list(FAMILIES))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"positions": "rotary", "line_embeddings": False},
    {"weave": True, "gain": 1e-5, "gain_per_channel": True},
    {"up_only": True, "gain": 0.5, "gain_speed": 200.0},
]
TEXTS = ["AB\nC", "hé"]


def build(family: str, *, side_px: int = 16, **options: Any) -> tuple[nn.Module, Tensor, Tensor, Conditioning]:
    """A UNet with random weights, and its inputs in float64."""
    config = FAMILIES[family](transcription=WRITING | options)
    x, c_noise, conditioning = inputs(config, dtype=torch.float64, side_px=side_px)
    return (
        random_weights(config.build().double()).eval(),
        x,
        c_noise,
        replace(conditioning, characters=character_ids(TEXTS, 12)),
    )


def test_characters_are_the_bytes_of_utf8_plus_one():
    ids = character_ids(["Aé", "", "\n"], 3)
    assert ids.tolist() == [[66, 0xC3 + 1, 0xA9 + 1], [0, 0, 0], [11, 0, 0]]
    assert character_ids([""], 3).shape == (1, 1)


def test_a_text_that_is_too_long_is_refused_or_truncated_after_a_complete_character():
    with pytest.raises(ValueError, match=r"transcription 'aé': 3 bytes in UTF-8, but .* at most 2 .*max_characters"):
        character_ids(["b", "aé"], 2)
    assert character_ids(["aé"], 2, truncate=True).tolist() == [[98]]


@FAMILY
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_and_every_character_has_an_effect(family: str, options: dict[str, Any]):
    unet, x, c_noise, conditioning = build(family, **options)
    result = unet(x, c_noise, conditioning)
    result.square().sum().backward()
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad and name not in NO_EFFECT:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    for texts in (["AB\nD", "hé"], ["BA\nC", "hé"], ["A\nBC", "hé"]):
        other = unet(x, c_noise, replace(conditioning, characters=character_ids(texts, 12)))
        assert not torch.allclose(other[0], result[0])
        torch.testing.assert_close(other[1], result[1])


@FAMILY
@pytest.mark.parametrize("weave", [False, True])
def test_a_new_model_predicts_what_one_without_transcriptions_predicts(family: str, weave: bool):
    plain = random_weights(FAMILIES[family]().build().double())
    config = FAMILIES[family](transcription=WRITING | {"weave": weave})
    writing = config.build().double()
    missing, unexpected = writing.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("transcription" in name for name in missing)
    x, c_noise, conditioning = inputs(config, dtype=torch.float64)
    with_texts = replace(conditioning, characters=character_ids(TEXTS, 12))
    torch.testing.assert_close(writing(x, c_noise, with_texts), plain(x, c_noise, conditioning), rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_does_not_matter(options: dict[str, Any]):
    unet, x, c_noise, conditioning = build("regular", **options)
    ids = conditioning.characters
    assert ids is not None
    longer = replace(conditioning, characters=F.pad(ids, (0, 12 - ids.shape[1])))
    torch.testing.assert_close(unet(x, c_noise, longer), unet(x, c_noise, conditioning), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@FAMILY
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_dropped_transcription_is_none_at_all(family: str, options: dict[str, Any]):
    unet, x, c_noise, conditioning = build(family, **options)
    dropped = replace(conditioning, characters_keep=torch.tensor([True, False]))
    none = replace(conditioning, characters=character_ids([TEXTS[0], ""], 12))
    result = unet(x, c_noise, dropped)
    torch.testing.assert_close(result, unet(x, c_noise, none), rtol=0, atol=0)
    result.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in unet.parameters())
    assert not torch.allclose(result[1], unet(x, c_noise, conditioning)[1])
    without = conditioning.without("transcription")
    assert without.text is conditioning.text
    assert without.text_keep is None
    for name, module in unet.named_modules():
        if isinstance(module, TranscriptionAttention):
            module.gain.factor.data.zero_()
            assert "transcription_attention" in name
    torch.testing.assert_close(unet(x, c_noise, without), unet(x, c_noise, conditioning), rtol=0, atol=0)


def attention(**options: Any) -> tuple[TranscriptionAttention, Tensor, Context]:
    config = TranscriptionConfig.model_validate(WRITING | options)
    layer = random_weights(TranscriptionAttention(config, 6, 4, 10).double())
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.tensor([[True, True, False], [True, False, False]])
    return layer, normal(2, 6, 4, 4), Context(normal(2, 10), None, None, normal(2, 3, 24), mask)


def test_pixels_attend_as_the_formula_says():
    layer, x, context = attention(gain_speed=4.0)
    assert context.characters is not None
    norm = layer.norm
    scale, shift = (
        norm.time(context.time)[:, :, None, None] + norm.rows[:, :, None] + norm.columns[:, None, :]
    ).chunk(2, dim=1)
    mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)
    normed = (x - mean) / (variance + 1e-5).sqrt() * norm.norm.weight[:, None, None] + norm.norm.bias[:, None, None]
    queries = (flatten_pixels(normed * (1 + scale) + shift) @ layer.attention.to_q.weight.T).unflatten(-1, (3, 8))
    assert layer.attention.context_to_kv is not None
    kv = layer.norm_characters(context.characters) @ layer.attention.context_to_kv.weight.T
    k, v = kv.unflatten(-1, (2, 3, 8)).unbind(2)
    expected = []
    for row, length in ((0, 2), (1, 1)):
        logits = torch.einsum("nhd,mhd->hnm", queries[row], k[row, :length]) / 8**0.5
        seen = torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v[row, :length]).flatten(1)
        expected.append((seen @ layer.attention.to_out.weight.T).T.unflatten(-1, (4, 4)))
    found = (layer(x, context) - x) / (4 * layer.gain.factor)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_weave_lets_characters_see_the_image_first():
    layer, x, context = attention(weave=True)
    weave, plain = layer.weave, attention()[0]
    assert weave is not None
    assert context.characters is not None
    changed = weave(context.characters, x, context.time)
    pixels = flatten_pixels(weave.norm_pixels(x, context.time))
    seen = context.characters + weave.gain(weave.attention(weave.norm(context.characters), pixels))
    torch.testing.assert_close(changed, seen + weave.feed_forward_gain(weave.feed_forward(seen)))
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("weave.")})
    torch.testing.assert_close(layer(x, context), plain(x, replace(context, characters=changed)))


@pytest.mark.parametrize(
    ("options", "gains"), [({}, [0.0]), ({"gain": 3.0, "gain_speed": 200.0}, [3.0]), (
        {"gain": 1e-5, "gain_per_channel": True}, [1e-5] * 6)]
)  # fmt: skip
def test_gains_start_as_configured(options: dict[str, Any], gains: list[float]):
    layer = TranscriptionAttention(TranscriptionConfig.model_validate(WRITING | options), 6, 4, 10)
    assert (layer.gain(torch.ones(layer.gain.factor.shape))).tolist() == pytest.approx(gains)
    weight = layer.attention.to_q.weight  # (24, 6)
    torch.testing.assert_close(weight.T @ weight, torch.eye(6), rtol=1e-5, atol=1e-5)


def test_places_of_other_sides_are_stretched():
    layer, x, context = attention()
    layer.norm.rows.data, layer.norm.columns.data = torch.ones_like(layer.norm.rows), torch.ones_like(layer.norm.rows)
    alike = layer(x[..., :1, :1].expand(2, 6, 8, 2), context)
    torch.testing.assert_close(alike, alike[..., :1, :1].expand(2, 6, 8, 2))


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_the_encoder_knows_order_lines_and_the_noise_level(positions: str):
    config = TranscriptionConfig.model_validate(WRITING | {"positions": positions})
    encoder = random_weights(TranscriptionEncoder(config, 10).double())
    assert [encoder.bias is not None, encoder.rotary is not None] == [positions == "relative", positions == "rotary"]
    time = torch.zeros(1, 10, dtype=torch.float64)

    def encode(text: str, level: float = 0.0) -> Tensor:
        return encoder(Conditioning(characters=character_ids([text], 12)), time + level)[0][0]

    assert not torch.allclose(encode("AB"), encode("AB", 1.0))
    assert not torch.allclose(encode("AB")[0], encode("BA")[1])
    one, two = encode("AA"), encode("A\nA")
    assert not torch.allclose(one[1], two[2])
    with torch.no_grad():
        encoder.places.weight.zero_()
    assert not torch.allclose(encode("AB")[0], encode("BA")[1]), "attention knows distances without places"


def test_captions_and_transcriptions_reach_the_same_image():
    unet, x, c_noise, conditioning = build("regular")
    result = unet(x, c_noise, conditioning)
    assert conditioning.text is not None
    assert not torch.allclose(result, unet(x, c_noise, replace(conditioning, text=conditioning.text + 1)))
    assert not torch.allclose(result, unet(x, c_noise, conditioning.without("transcription")))


@pytest.mark.slow
def test_the_model_compiles_as_one_graph():
    layer, x, context = attention(weave=True)
    encoder = TranscriptionEncoder(TranscriptionConfig.model_validate(WRITING | {"depth": 1}), 10).double()
    conditioning = Conditioning(characters=character_ids(TEXTS, 12))
    for module, arguments in ((layer, (x, context)), (encoder, (conditioning, context.time))):
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), module(*arguments))


def test_recomputing_activations_does_not_change_gradients():
    unet, x, c_noise, conditioning = build("regular", weave=True)
    config = FAMILIES["regular"](transcription=WRITING | {"weave": True}, activation_checkpointing=True)
    recomputing = config.build().double()
    recomputing.load_state_dict(unet.state_dict())
    for model in (unet, recomputing):
        model(x, c_noise, conditioning).square().sum().backward()
    for one, other in zip(unet.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@FAMILY
def test_the_model_runs_on_other_sizes_and_in_bfloat16(family: str):
    unet, x, c_noise, conditioning = build(family, weave=True, side_px=10)
    assert unet(x, c_noise, conditioning).shape == (2, 3, 10, 10)
    unet, conditioning = unet.float(), conditioning.to("cpu", torch.float32)
    single = unet(x.float(), c_noise.float(), conditioning)
    with torch.autocast("cpu", torch.bfloat16):
        half = unet(x.float(), c_noise.float(), conditioning)
    assert (half - single).norm() < 0.03 * single.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 20}, "dim 20 must be a multiple of head_dim 8"),
        ({"head_dim": 3}, r"head_dim must be even \(got 3\)"),
        ({"resolutions": (8, 32)}, r"transcription.resolutions \(8, 32\): the levels have sides of \[16, 8\] px"),
        ({"gain_speed": 0}, "gain_speed"),
    ],
)
def test_wrong_configurations_are_refused_with_the_values(changes: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        FAMILIES["regular"](transcription=WRITING | changes)


def test_hybrid_unets_say_that_they_read_none():
    config = next(iter(HYBRID_PRESETS.values())).config
    with pytest.raises(ValidationError, match="transcription: Hybrid UNets read none"):
        type(config).model_validate(config.model_dump() | {"transcription": WRITING})


def test_missing_and_too_many_characters_are_named():
    unet, x, c_noise, conditioning = build("regular")
    with pytest.raises(ValueError, match=r"conditioning.characters: this model reads transcriptions"):
        unet(x, c_noise, replace(conditioning, characters=None))
    with pytest.raises(ValueError, match=r"at most 12 bytes per transcription \(got 13\)"):
        unet(x, c_noise, replace(conditioning, characters=torch.ones(2, 13, dtype=torch.int64)))
