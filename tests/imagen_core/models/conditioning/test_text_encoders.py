"""Tokens of several text encoders as conditions of every family of networks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from imagen_core.diffusion import DenoiserConfig
from imagen_core.models.conditioning.base import Conditioning, cat
from imagen_core.models.conditioning.text_layers import TextEncoders
from imagen_core.train.memory import estimate_memory
from tests.imagen_core.models.conditioning.test_text_layers import config
from tests.imagen_core.models.small import random_weights, regular

WIDE, NARROW, LAYERS = 12, 10, 3
LENGTHS = ((3, 4), (2, 1))
"""Tokens of the two captions by each encoder."""
FAMILIES = ("regular", "efficient", "hybrid", "transformer", "prior")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(number: int, padded_to: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Embeddings of the two captions by one encoder, zero-padded, and their mask; the real ones never change."""
    text, mask = torch.zeros(2, padded_to, *shape).double(), torch.zeros(2, padded_to, dtype=torch.bool)
    for row, length in enumerate(LENGTHS[number]):
        text[row, :length] = normal(length, *shape, seed=10 * number + row)
        mask[row, :length] = True
    return text, mask


def inputs(family: str, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Conditioning]:
    embed = normal(2, 16, seed=91) if family == "prior" else None
    x = normal(2, 16, seed=92) if family == "prior" else normal(2, 3, 16, 16, seed=92)
    text, mask = zip(*pairs, strict=True)
    return x, torch.tensor([3.0, 11.0]).double(), Conditioning(text=text, text_mask=mask, text_embed=embed)


def both(family: str, padded_to: tuple[int, int] = (4, 2)) -> tuple[Tensor, Tensor, Conditioning]:
    return inputs(family, tokens(0, padded_to[0], WIDE), tokens(1, padded_to[1], NARROW))


def model_of(family: str, **changes: Any) -> nn.Module:
    return random_weights(config(family, **{"text_dim": [WIDE, NARROW], **changes}).build()).double()


def encoders_of(model: nn.Module) -> TextEncoders:
    (found,) = [module for module in model.modules() if isinstance(module, TextEncoders)]
    return found


def one_encoder(model: nn.Module, family: str) -> nn.Module:
    """The same network without what joins the encoders."""
    plain = config(family, text_dim=WIDE).build().double()
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if "text_layers." not in name})
    return plain


def projected(encoders: TextEncoders, number: int, text: Tensor) -> Tensor:
    """Norm and linear layer of one encoder, written out."""
    weights = dict(encoders.projections[number].named_parameters())
    scaled = (text - text.mean(-1, keepdim=True)) / (text.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    scaled = scaled * weights["norm.weight"] + weights["norm.bias"]
    return F.linear(scaled, weights["linear.weight"], weights["linear.bias"])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_tokens_of_the_second_encoder_it_is_the_network_of_the_first(family: str) -> None:
    model = model_of(family)
    x, c_noise, conditioning = both(family)
    encoders = encoders_of(model)
    with torch.no_grad():
        for parameter in encoders.projections[1].parameters():
            parameter.zero_()
        first, (mask, gone) = conditioning.text[0], conditioning.text_mask
        masked = replace(conditioning, text_mask=(mask, torch.zeros_like(gone)))
        alone = replace(conditioning, text=projected(encoders, 0, first), text_mask=mask)
        expected = one_encoder(model, family)(x, c_noise, alone)
        torch.testing.assert_close(model(x, c_noise, masked), expected)
        assert not torch.allclose(model(x, c_noise, conditioning), expected), "zero tokens are still attended to"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_all_encoders_are_one_sequence_without_padding_between_them(family: str) -> None:
    model = model_of(family)
    x, c_noise, conditioning = both(family, (6, 5))
    encoders = encoders_of(model)
    text, mask = torch.zeros(2, 7, WIDE).double(), torch.zeros(2, 7, dtype=torch.bool)
    for row in range(2):
        real = [projected(encoders, k, conditioning.text[k][row][conditioning.text_mask[k][row]]) for k in (0, 1)]
        joined = torch.cat(real)
        text[row, : len(joined)], mask[row, : len(joined)] = joined, True
    expected = one_encoder(model, family)(x, c_noise, replace(conditioning, text=text, text_mask=mask))
    torch.testing.assert_close(model(x, c_noise, conditioning), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_how_much_padding_there_is_nor_where_it_lies_changes_anything(family: str) -> None:
    model = model_of(family)
    x, c_noise, conditioning = both(family)
    expected = model(x, c_noise, conditioning)
    torch.testing.assert_close(model(*both(family, (7, 5))), expected)
    in_front = conditioning.map_text(lambda t: torch.cat([torch.zeros_like(t[:, :1]), t], dim=1))
    torch.testing.assert_close(model(x, c_noise, in_front), expected)
    noise = tuple(t.masked_fill(~m[..., None], 7.0) for t, m in zip(in_front.text, in_front.text_mask, strict=True))
    torch.testing.assert_close(model(x, c_noise, replace(in_front, text=noise)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_encoders_learn_and_both_have_an_effect(family: str) -> None:
    model = model_of(family)
    x, c_noise, conditioning = both(family)
    text = tuple(t.clone().requires_grad_() for t in conditioning.text)
    model(x, c_noise, replace(conditioning, text=text)).square().sum().backward()
    for name, parameter in encoders_of(model).named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    for each, mask in zip(text, conditioning.text_mask, strict=True):
        assert ((each.grad.abs().sum(-1) > 0) == mask).all(), "real tokens, and not padding"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_caption_is_dropped_of_all_encoders(family: str) -> None:
    model = model_of(family)
    x, c_noise, conditioning = both(family)
    keep = torch.tensor([True, False])
    other = replace(conditioning, text=tuple(t.flip(-1) for t in conditioning.text))
    one, two = (model(x, c_noise, each.with_keep("text", keep)) for each in (conditioning, other))
    assert not torch.allclose(one[0], two[0])
    torch.testing.assert_close(one[1], two[1])
    torch.testing.assert_close(one[0], model(x, c_noise, conditioning)[0])


@pytest.mark.parametrize("join", ["weighted_sum", "concat"])
def test_one_encoder_may_have_layers_and_the_other_none(join: str) -> None:
    model = model_of("hybrid", num_text_layers=[None, LAYERS], text_layer_join=join)
    encoders = encoders_of(model)
    x, c_noise, conditioning = inputs("hybrid", tokens(0, 4, WIDE), tokens(1, 2, LAYERS, NARROW))
    layers = conditioning.text[1]
    if join == "weighted_sum":
        weights = encoders.layers["1"].weights.softmax(dim=0)
        joined = sum(weights[k] * layers[:, :, k] for k in range(LAYERS))
    else:
        joined = torch.cat([layers[:, :, k] for k in range(LAYERS)], dim=-1)
    assert encoders.projections[1].linear.weight.shape == (WIDE, joined.shape[-1])
    first, second = (projected(encoders, k, each) for k, each in enumerate((conditioning.text[0], joined)))
    flat = replace(
        conditioning, text=torch.cat([first, second], dim=1), text_mask=torch.cat(conditioning.text_mask, dim=1)
    )
    found = encoders(conditioning)
    for row in range(2):
        real = flat.text[row][flat.text_mask[row]]
        torch.testing.assert_close(found.text[row, : len(real)], real)
        assert found.text_mask[row].tolist() == [k < len(real) for k in range(6)]
    assert model(x, c_noise, conditioning).isfinite().all()


def test_padded_tokens_of_nemo_count_those_of_all_encoders() -> None:
    model = model_of("regular", padded_tokens=7, pooling="mean", cond_dim=32)
    torch.testing.assert_close(model(*both("regular")), model(*both("regular", (4, 3))))
    with pytest.raises(ValueError, match="8 tokens, this model reads at most 7"):
        model(*both("regular", (5, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_dim": []}, "text_dim"),
        ({"text_dim": [WIDE, 0]}, "text_dim"),
        ({"text_dim": [WIDE, NARROW], "num_text_layers": 3}, "num_text_layers is 3, but text_dim is"),
        ({"text_dim": [WIDE, NARROW], "num_text_layers": [3]}, "give both as lists of the same length"),
        ({"text_dim": WIDE, "num_text_layers": [3]}, "give both as lists of the same length"),
        ({"text_layer_join": "concat"}, "text_layer_join is 'concat', but num_text_layers is null"),
        ({"text_dim": None, "text_layer_join": "concat", "attention_type": "self"}, "there are no layers to join"),
        ({"text_dim": [WIDE], "num_text_layers": [None], "text_layer_join": "concat"}, "no layers to join"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        regular(**changes)


def test_embeddings_of_other_encoders_than_the_network_reads_are_refused() -> None:
    x, c_noise, conditioning = both("regular")
    several, plain = model_of("regular"), regular(text_dim=WIDE).build().double()
    first, second = conditioning.text
    for wrong, message in (
        (first, r"reads 2 text encoders \(got one tensor\)"),
        ((first,), r"reads 2 text encoders \(got 1\)"),
        ((second, first), r"reads \(captions, tokens, 12\) of encoder 0 \(got \(2, 2, 10\)\)"),
        ((first[:, :, None], second), r"of encoder 0 \(got \(2, 4, 1, 12\)\)"),
    ):
        with pytest.raises(ValueError, match=message):
            several(x, c_noise, replace(conditioning, text=wrong))
    with pytest.raises(ValueError, match="text_mask: give a mask of each of the 2"):
        several(x, c_noise, replace(conditioning, text_mask=conditioning.text_mask[0]))
    with pytest.raises(ValueError, match=r"reads one text encoder \(got several\)"):
        plain(x, c_noise, conditioning)
    with pytest.raises(ValueError, match=r"reads one text encoder \(got several\)"):
        regular(num_text_layers=LAYERS).build().double()(x, c_noise, conditioning)
    with pytest.raises(ValueError, match="this model reads captions; give text"):
        several(x, c_noise, replace(conditioning, text=None, text_mask=None))


def test_batches_of_several_encoders_are_cut_joined_and_moved_like_others() -> None:
    conditioning = both("prior")[2].with_keep("text", torch.tensor([True, False]))
    halves = [conditioning.rows(slice(0, 1)), conditioning.rows(slice(1, 2))]
    assert [t.shape for t in halves[0].text] == [(1, 4, WIDE), (1, 2, NARROW)]
    again = cat(halves)
    for one, other in zip((*again.text, *again.text_mask), (*conditioning.text, *conditioning.text_mask), strict=True):
        assert torch.equal(one, other)
    assert again.has("text")
    half = conditioning.to("cpu", torch.float32)
    assert {t.dtype for t in half.text} == {torch.float32}
    assert {t.dtype for t in half.text_mask} == {torch.bool}
    assert conditioning.without_inputs("text").text is None
    only = Conditioning(text=conditioning.text, text_mask=conditioning.text_mask)
    assert only.unconditional().text_keep.tolist() == [False, False]


def test_the_estimate_of_memory_counts_every_encoder() -> None:
    def estimate(**changes: Any) -> Any:
        unet = regular(**changes)
        found = estimate_memory(
            DenoiserConfig(unet=unet, size_px=16),
            micro_batch_size=1,
            shape=(16, 16),
            num_tokens=64,
            bytes_per_activation=4,
            num_averages=1,
            num_shards=1,
        )
        assert found.weights == 4 * sum(p.numel() for p in unet.build().parameters())
        return found

    one, two = estimate(text_dim=[WIDE]), estimate(text_dim=[WIDE, NARROW])
    projection = 2 * NARROW + NARROW * WIDE + WIDE
    assert two.weights - one.weights == 4 * projection
    assert two.activations - one.activations >= 4 * 64 * NARROW
