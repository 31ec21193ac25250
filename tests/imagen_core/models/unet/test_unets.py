"""What holds for the Regular and the Efficient UNet alike."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from imagen_core.models import UNetConfig
from imagen_core.models.conditioning.text import AttentionPooling, MeanPooling
from imagen_core.models.layers.attention import Attention
from imagen_core.models.layers.noise_embedding import LearnedFourierEmbedding, SinusoidalEmbedding
from imagen_core.models.layers.resblock import ResBlock
from imagen_core.models.unet.block import Block
from tests.imagen_core.models.small import FAMILIES, NO_EFFECT, calls_of, efficient, inputs, random_weights, regular

FAMILY = pytest.mark.parametrize("family", list(FAMILIES))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"attention_type": "cross"},
    {"attention_type": "stacked"},
    {"attention_type": "self"},
    {"attention_type": "self", "text_dim": None, "num_classes": 10, "out_channels": 6},
    {"pooling": "mean", "null_token": True, "dropped_caption": "no_tokens"},
    {"learned_fourier_frequencies": 8, "num_heads": 2},
    {"low_res": True, "low_res_noise": True},
    {"pooling": "multihead", "pooling_heads": 3, "activation": "gelu", "shared_norm": True},
    {"time_embed_dim": 40, "time_activations": 2, "pooling": "multihead", "pooling_heads": 4},
    {"image_embed_dim": 10, "self_conditioning": True, "condition_channels": 2},
    {"text_dim": None, "image_embed_dim": 24, "attention_type": "cross"},
    {"text_dim": None, "image_embed_dim": 10, "attention_type": "self"},
    {"in_channels": 1, "out_channels": 1, "dropout": 0.1, "channel_mult": (1, 3)},
]


def build(family: str, **changes: Any) -> tuple[Any, Any]:
    config = FAMILIES[family](**changes)
    return config, random_weights(config.build()).eval()


def gradients(unet: nn.Module, *arguments: Any) -> list[Tensor]:
    unet.zero_grad()
    unet(*arguments).square().sum().backward()
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in unet.parameters()]


@FAMILY
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_and_every_condition_has_an_effect(family: str, options: dict[str, Any]):
    config, unet = build(family, **options)
    x, c_noise, conditioning = inputs(config)
    result = unet(x, c_noise, conditioning)
    assert result.shape == (2, config.out_channels, 16, 16)
    for name, gradient in zip(dict(unet.named_parameters()), gradients(unet, x, c_noise, conditioning), strict=True):
        assert gradient.isfinite().all(), name
        assert gradient.any() or name in NO_EFFECT, name
    assert not torch.allclose(result, unet(x, c_noise + 1, conditioning))
    for name in ("text", "low_res", "low_res_noise", "labels", "image_embed", "images", "estimate"):
        value = getattr(conditioning, name)
        if value is not None:
            changed = value.flip(0) if name == "text" else value + 1
            assert not torch.allclose(result, unet(x, c_noise, replace(conditioning, **{name: changed}))), name


@FAMILY
@pytest.mark.parametrize("attention_type", ["fused", "cross", "stacked"])
def test_padding_of_captions_does_not_matter(family: str, attention_type: str):
    config, unet = build(family, attention_type=attention_type)
    unet = unet.double()
    results = []
    for padded_to in (20, 40):
        x, c_noise, conditioning = inputs(config, padded_to=padded_to, dtype=torch.float64)
        conditioning = replace(conditioning, text_keep=torch.tensor([True, False]))
        results.append(unet(x, c_noise, conditioning))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@FAMILY
@pytest.mark.parametrize("attention_type", ["fused", "cross", "stacked"])
def test_a_dropped_caption_is_not_seen(family: str, attention_type: str):
    for option, lengths in (("zero_tokens", (4, 4)), ("no_tokens", (1, 6))):
        config, unet = build(family, attention_type=attention_type, dropped_caption=option)
        x, c_noise, conditioning = inputs(config.model_copy(), lengths=lengths)
        x, c_noise = x[:1].expand(2, -1, -1, -1), c_noise[:1].expand(2)
        if conditioning.low_res is not None:
            conditioning = replace(conditioning, low_res=conditioning.low_res[:1].expand(2, -1, -1, -1))
        first, second = unet(x, c_noise, conditioning.unconditional())
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
        first, second = unet(x, c_noise, conditioning)
        assert not torch.allclose(first, second, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@FAMILY
@pytest.mark.parametrize("attention_type", ["fused", "cross", "stacked"])
@pytest.mark.parametrize("half", [False, True])
def test_empty_captions_train_without_nan(family: str, attention_type: str, half: bool):
    config, unet = build(family, attention_type=attention_type)
    x, c_noise, conditioning = inputs(config, lengths=(0, 0))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = unet.train()(x, c_noise, conditioning.unconditional()).float().square().mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in unet.parameters())


@FAMILY
def test_a_row_does_not_depend_on_the_others(family: str):
    config, unet = build(family)
    x, c_noise, conditioning = inputs(config)
    together = unet(x, c_noise, conditioning)
    alone = unet(x[1:], c_noise[1:], conditioning.rows(slice(1, 2)))
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


@FAMILY
def test_recomputing_activations_does_not_change_gradients(family: str):
    config, unet = build(family)
    recomputing = config.model_copy(update={"activation_checkpointing": True}).build()
    recomputing.load_state_dict(unet.state_dict())
    arguments = inputs(config)
    for one, other in zip(gradients(unet, *arguments), gradients(recomputing, *arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@FAMILY
@pytest.mark.parametrize("recomputes", [False, True])
def test_every_block_is_computed_again_in_the_backward_pass_where_configured(family: str, recomputes: bool):
    config, unet = build(family, activation_checkpointing=recomputes)
    blocks = [module for module in unet.modules() if isinstance(module, Block)]
    forward, backward = calls_of(blocks, unet, *inputs(config))
    assert forward == [1] * len(blocks)
    assert backward == [int(recomputes)] * len(blocks)


@FAMILY
@pytest.mark.parametrize(
    ("options", "heads"),
    [({"head_dim": 16}, {32: (2, 16), 64: (4, 16)}), ({"num_heads": 2}, {32: (2, 16), 64: (2, 32)})],
    ids=str,
)
def test_heads_are_by_width_or_by_number(family: str, options: dict[str, Any], heads: dict[int, tuple[int, int]]):
    _, unet = build(family, **options)
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    widths = [attention.to_q.in_features for attention in attentions]
    assert set(widths) == ({32, 64} if family == "efficient" else {64})
    assert [(a.num_heads, a.head_dim) for a in attentions] == [heads[width] for width in widths]


@FAMILY
def test_every_resblock_has_the_configured_dropout(family: str):
    _, unet = build(family, dropout=0.25)
    assert {module.dropout.p for module in unet.modules() if isinstance(module, ResBlock)} == {0.25}


@FAMILY
@pytest.mark.parametrize(("pooling", "kind"), [("attention", AttentionPooling), ("mean", MeanPooling)])
@pytest.mark.parametrize("null_token", [False, True])
def test_captions_are_read_as_configured(family: str, pooling: str, kind: type, null_token: bool):
    _, unet = build(family, pooling=pooling, null_token=null_token)
    text = unet.inputs.text
    assert type(text.pool) is kind
    assert (text.null_token is not None) == null_token


@FAMILY
@pytest.mark.parametrize("frequencies", [None, 16])
def test_noise_levels_are_embedded_as_configured(family: str, frequencies: int | None):
    options = {"low_res": True, "low_res_noise": True, "learned_fourier_frequencies": frequencies}
    _, unet = build(family, **options)
    for embedding in (unet.inputs.time.embedding, unet.inputs.low_res_time.embedding):
        assert type(embedding) is (SinusoidalEmbedding if frequencies is None else LearnedFourierEmbedding)
        assert embedding.out_dim == (32 if frequencies is None else 2 * 16 + 1)


@FAMILY
def test_recomputing_repeats_the_same_dropout(family: str):
    config = FAMILIES[family](dropout=0.5)
    unet = random_weights(config.build())
    recomputing = config.model_copy(update={"activation_checkpointing": True}).build()
    recomputing.load_state_dict(unet.state_dict())
    arguments, found = inputs(config), []
    for model in (unet, recomputing):
        torch.manual_seed(3)
        found.append(gradients(model.train(), *arguments))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@FAMILY
def test_channels_last_and_bfloat16_give_the_same_image(family: str):
    config, unet = build(family)
    x, c_noise, conditioning = inputs(config)
    plain = unet(x, c_noise, conditioning)
    with torch.autocast("cpu", torch.bfloat16):
        half = unet(x, c_noise, conditioning)
    assert (half - plain).norm() < 0.03 * plain.norm()
    unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    strided = unet(x.to(memory_format=torch.channels_last), c_noise, conditioning)
    torch.testing.assert_close(strided, plain, rtol=1e-4, atol=1e-4)


@FAMILY
@pytest.mark.slow
def test_the_model_compiles_as_one_graph(family: str):
    config, unet = build(family)
    arguments = inputs(config)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), unet(*arguments))


@FAMILY
def test_the_model_runs_on_crops_and_other_sizes_its_levels_divide(family: str):
    config, unet = build(family)
    assert config.sides_divisor == 2
    x, c_noise, conditioning = inputs(config, side_px=10)
    assert unet(x, c_noise, conditioning).shape == (2, 3, 10, 10)
    x, c_noise, conditioning = inputs(config, side_px=9)
    with pytest.raises(ValueError, match=r"sides that are multiples of 2 px \(got \(9, 9\)\)"):
        unet(x, c_noise, conditioning)


@FAMILY
@pytest.mark.parametrize("writing", [False, True])
def test_an_image_need_not_be_square(family: str, writing: bool):
    """A tall image, mirrored at its diagonal with all kernels, gives the mirrored result."""
    changes: dict[str, Any] = {"low_res": True}
    if writing:
        changes["transcription"] = {"dim": 16, "depth": 1, "resolutions": (8,), "head_dim": 8, "gain": 1.0}
    config, unet = build(family, **changes)
    x, c_noise, conditioning = inputs(config)
    conditioning = replace(conditioning, low_res=x[..., :12])
    if writing:
        conditioning = replace(conditioning, characters=torch.tensor([[3, 4], [5, 0]]))
    tall = unet(x[..., :12], c_noise, conditioning)
    assert tall.shape == (2, 3, 16, 12)
    mirrored = deepcopy(unet)
    for name, parameter in list(mirrored.named_parameters()):
        if parameter.dim() == 4:
            parameter.data = parameter.data.transpose(2, 3).contiguous()
        if name.endswith(".rows"):
            columns = mirrored.get_parameter(name.replace(".rows", ".columns"))
            parameter.data, columns.data = columns.data, parameter.data
    conditioning = replace(conditioning, low_res=x[..., :12].transpose(2, 3))
    wide = mirrored(x[..., :12].transpose(2, 3), c_noise, conditioning)
    torch.testing.assert_close(wide.transpose(2, 3), tall, rtol=1e-4, atol=1e-4)


@FAMILY
def test_missing_conditions_are_named(family: str):
    config, unet = build(family, low_res=True, low_res_noise=True, num_classes=4)
    x, c_noise, conditioning = inputs(config)
    for name in ("text", "low_res", "low_res_noise", "labels"):
        with pytest.raises(ValueError, match=f"conditioning.{name}:"):
            unet(x, c_noise, replace(conditioning, **{name: None}))
    with pytest.raises(ValueError, match=r"an image of \(2, 3, 16, 16\) \(got \(2, 3, 8, 8\)\)"):
        unet(x, c_noise, replace(conditioning, low_res=torch.zeros(2, 3, 8, 8)))


@FAMILY
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_configuration_survives_json(family: str, options: dict[str, Any]):
    config = FAMILIES[family](**options)
    adapter: TypeAdapter[Any] = TypeAdapter(UNetConfig)
    again = adapter.validate_json(config.model_dump_json())
    assert again == config
    assert type(again) is type(config)


@FAMILY
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size_px": 17}, r"image_size_px must be a multiple of 2 for 2 levels \(got 17\)"),
        ({"num_res_blocks": (1, 1, 1)}, "num_res_blocks has 3 entries for 2 levels"),
        ({"embed_dim": 40}, r"multiples of 32 \(got 40\)"),
        ({"head_dim": 48}, "head_dim 48 does not divide the 64 channels"),
        ({"num_heads": 7}, "num_heads 7 does not divide the 64 channels"),
        ({"text_dim": None}, "'fused' reads text, but text_dim is null"),
        ({"low_res": False, "low_res_noise": True}, "low_res_noise needs low_res"),
        ({"attention": "fused"}, "Extra inputs"),
        ({"num_res_blocks": (0, 1)}, "num_res_blocks"),
    ],
)
def test_wrong_configurations_are_refused_with_the_values(family: str, changes: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        FAMILIES[family](**changes)


@pytest.mark.parametrize("family", [regular, efficient])
@pytest.mark.parametrize("kernel", [3, 7])
def test_the_first_convolution_has_the_configured_kernel(family, kernel: int):
    config = family(init_kernel_size=kernel)
    assert config.build().conv_in.weight.shape == (32, config.input_channels, kernel, kernel)
    with pytest.raises(ValidationError, match=r"init_kernel_size must be odd \(got 4\)"):
        family(init_kernel_size=4)


@pytest.mark.parametrize("family", [regular, efficient])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_every_resblock_scales_and_shifts_or_adds_as_configured(family, scale_shift: bool):
    blocks = [m for m in family(scale_shift=scale_shift).build().modules() if isinstance(m, ResBlock)]
    assert {b.scale_shift for b in blocks} == {scale_shift}
    assert {b.time.out_features / b.conv1.out_channels for b in blocks} == {1 + scale_shift}
