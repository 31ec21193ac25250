"""The Hybrid family on small models with random weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.hybrid.blocks import CrossEmbed, GlobalContext, TransformerBlock
from imagen_core.models.hybrid.unet import HybridUNet, HybridUNetConfig
from imagen_core.models.layers.resblock import ResBlock, StandardizedConv2d
from imagen_core.models.unet.block import Block
from tests.imagen_core.models.small import TEXT_DIM, calls_of, captions, other_conditions, random_weights

VARIANTS: dict[str, dict[str, Any]] = {
    "paddle": {},
    "imagen_pytorch": {"norm": "rms", "qk_norm": True},
    "first_level_wider_than_dim": {"dim_mults": (2, 3), "combine_up_features": True, "init_residual": True},
    "minimagen": {
        "perceiver": False,
        "attend_to_conditions": False,
        "middle_attention": False,
        "downsample": "conv",
        "upsample": "repeat_conv",
        "global_context": False,
        "final_global_context": False,
        "num_fourier_frequencies": None,
    },
    "super_resolution": {"memory_efficient": True, "initial_res_block": True, "low_res": True, "low_res_noise": True},
    "without_captions": {"text_dim": None, "unread_caption_parameters": True},
    "dalle2_decoder": {
        "text_in_middle_only": True,
        "caption_vector": False,
        "perceiver": False,
        "conditions_in": "other_blocks",
        "image_embed_dim": 10,
        "cross_num_heads": 3,
        "cross_head_dim": 4,
        "ff_mult": 0,
        "attend_to_conditions": False,
        "deepest_widen": "conv",
        "res_block": "conv_first",
        "init_residual": True,
        "out_kernel_size": 1,
    },
    "imported": {
        "memory_efficient": True,
        "convs_after": True,
        "level_activation": "gelu",
        "init_kernels": (5,),
        "middle_cross_num_heads": 1,
        "middle_cross_head_dim": 4,
        "middle_transformer_depth": 2,
        "perceiver_num_latents": 5,
        "perceiver_num_heads": 3,
        "perceiver_head_dim": 4,
        "combine_up_features": True,
        "combine_at": "full",
    },
    "linear_attention": {"attention_levels": (True, "linear"), "cross_attention_levels": (True, "linear")},
    "other_options": {
        "transformer_depth": (1, 2),
        "downsample": "cross_embed",
        "weight_standardization": True,
        "combine_up_features": True,
        "num_classes": 5,
        "self_conditioning": True,
        "condition_channels": 2,
    },
}


def config(**changes: Any) -> HybridUNetConfig:
    options = {
        "image_size_px": 16,
        "dim": 16,
        "dim_mults": (1, 2),
        "num_res_blocks": (1, 2),
        "attention_levels": (False, True),
        "cross_attention_levels": (False, True),
        "num_heads": 2,
        "head_dim": 8,
        "text_dim": TEXT_DIM,
        "max_text_tokens": 12,
    }
    return HybridUNetConfig.model_validate(options | changes)


def unet(dtype: torch.dtype = torch.float64, **changes: Any) -> HybridUNet:
    return random_weights(config(**changes).build().to(dtype))


def inputs(model: HybridUNet, padded_to: int = 6, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    c_noise = torch.tensor([0.3, -0.7], dtype=dtype)
    text, mask = captions((3, 5), padded_to, dtype=dtype) if model.config.text_dim else (None, None)
    low = model.config.low_res
    more = other_conditions(model.config, 2, dtype)
    conditioning = replace(more, text=text, text_mask=mask, low_res=x.flip(0) if low else None,
                           low_res_noise=c_noise.flip(0) if low else None)  # fmt: skip
    return x, c_noise, conditioning


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_an_image_need_not_be_square(variant: str) -> None:
    model = unet(**VARIANTS[variant])
    x, c_noise, conditioning = inputs(model)

    def narrow(image: Tensor | None) -> Tensor | None:
        return None if image is None else image[..., :8]

    images = {name: narrow(getattr(conditioning, name)) for name in ("low_res", "images", "estimate")}
    with torch.no_grad():
        square, tall = model(x, c_noise, conditioning), model(x[..., :8], c_noise, replace(conditioning, **images))
    assert tall.shape == (2, 3, 16, 8)
    assert torch.isfinite(tall).all()
    assert 0.2 < tall.std() / square.std() < 5


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_padding_changes_nothing_and_every_trained_parameter_has_a_gradient(variant: str) -> None:
    model = unet(**VARIANTS[variant])
    short, long = (model(*inputs(model, padded_to)) for padded_to in (5, 9))
    torch.testing.assert_close(short, long)
    assert short.shape == (2, 3, 16, 16)
    short.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert "unread" in name


@pytest.mark.parametrize("variant", ["paddle", "minimagen"])
def test_a_dropped_caption_is_the_learned_one_whatever_it_was(variant: str) -> None:
    model = unet(**VARIANTS[variant])
    x, c_noise, conditioning = inputs(model)
    keep = torch.tensor([True, False])
    first = model(x, c_noise, replace(conditioning, text_keep=keep))
    assert conditioning.text is not None
    other = replace(conditioning, text=conditioning.text * 3, text_mask=torch.ones(2, 6, dtype=torch.bool))
    second = model(x, c_noise, replace(other, text_keep=keep))
    torch.testing.assert_close(first[1], second[1])
    assert not torch.allclose(first[0], second[0])


def test_global_context_gates_with_the_attention_pooled_pixel() -> None:
    gate = random_weights(GlobalContext(8).double())
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    pixels = x.flatten(2)  # (b, c, n)
    scores = torch.einsum("c,bcn->bn", gate.score.weight[0, :, 0, 0], pixels) + gate.score.bias
    weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
    pooled = (pixels * weights[:, None]).sum(dim=2)
    first, last = gate.gate[0], gate.gate[2]
    hidden = torch.nn.functional.silu(pooled @ first.weight[:, :, 0, 0].T + first.bias)
    expected = x * torch.sigmoid(hidden @ last.weight[:, :, 0, 0].T + last.bias)[:, :, None, None]
    torch.testing.assert_close(gate(x), expected)


def test_recomputing_activations_gives_the_same_gradients() -> None:
    plain = unet()
    recomputed = unet(activation_checkpointing=True)
    for model in (plain, recomputed):
        model(*inputs(model)).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("recomputes", [False, True])
def test_every_block_is_computed_again_in_the_backward_pass_where_configured(recomputes: bool) -> None:
    model = unet(initial_res_block=True, activation_checkpointing=recomputes)
    blocks = [module for module in model.modules() if isinstance(module, Block | TransformerBlock)]
    forward, backward = calls_of(blocks, model, *inputs(model))
    assert forward == [1] * len(blocks)
    assert backward == [int(recomputes)] * len(blocks)


def test_depth_and_linear_attention_are_set_by_level() -> None:
    model: Any = unet(
        attention_levels=("linear", True), cross_attention_levels=(True, "linear"), transformer_depth=(1, 3)
    )
    levels = [*model.down, *model.up]
    pixels = [[layer.attention.linear for layer in level.transformer.layers] for level in levels]
    conditions = [level.first.layer.text_attention.attention.linear for level in levels]
    assert pixels == [[True], [False] * 3, [False] * 3, [True]]
    assert conditions == [False, True, True, False]


def test_heads_are_of_all_levels_or_of_each_and_the_middle_has_the_last_ones() -> None:
    model: Any = unet(
        attention_levels=(True, True), cross_attention_levels=(True, True), num_heads=(2, 3), head_dim=(16, 24)
    )
    levels = [*model.down, *model.up]
    pixels = [level.transformer.layers[0].attention for level in levels]
    conditions = [level.first.layer.text_attention.attention for level in levels]
    middle = [model.middle[1].layers[0].attention, model.middle[0].layer.text_attention.attention]
    for attentions in (pixels, conditions):
        assert [(a.num_heads, a.head_dim) for a in attentions] == [(2, 16), (3, 24), (3, 24), (2, 16)]
    assert [(a.num_heads, a.head_dim) for a in middle] == [(3, 24)] * 2
    assert model(*inputs(model)).isfinite().all()
    with pytest.raises(ValidationError, match="num_heads has 3 entries for 2 levels"):
        unet(num_heads=(2, 3, 4))
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        unet(head_dim=(2, 0))


@pytest.mark.parametrize(
    ("downsample", "kernels_and_strides"),
    [("pixel_unshuffle", [(1, 1)]), ("conv", [(4, 2)]), ("cross_embed", [(2, 2), (4, 2)])],
)
@pytest.mark.parametrize("before", [False, True])
def test_levels_downsample_by_the_configured_convolutions(
    downsample: str, kernels_and_strides: list[tuple[int, int]], before: bool
) -> None:
    model: Any = unet(downsample=downsample, memory_efficient=before)
    first = model.down[0]
    changed = (first.after, first.before)[before]
    convs = [module for module in changed.modules() if isinstance(module, nn.Conv2d)]
    assert [(conv.kernel_size[0], conv.stride[0]) for conv in convs] == kernels_and_strides
    assert any(isinstance(module, nn.PixelUnshuffle) for module in changed.modules()) == (
        downsample == "pixel_unshuffle"
    )


def test_convolutions_of_several_kernels_stand_side_by_side() -> None:
    embed = random_weights(CrossEmbed(3, 8, kernels=(2, 4), stride=2).double())
    x = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    two, four = embed.convs
    result = embed(x)
    assert result.shape == (1, 8, 3, 3)
    windows = nn.functional.pad(x, (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)  # (1, 3, 3, 3, 4, 4)
    small = torch.einsum("bchwij,ocij->bohw", windows[..., 1:3, 1:3], two.weight) + two.bias[:, None, None]
    large = torch.einsum("bchwij,ocij->bohw", windows, four.weight) + four.bias[:, None, None]
    torch.testing.assert_close(result, torch.cat([small, large], dim=1))


@pytest.mark.parametrize("standardized", [False, True])
def test_every_resblock_has_standardised_kernels_where_configured(standardized: bool) -> None:
    blocks = [m for m in unet(weight_standardization=standardized).modules() if isinstance(m, ResBlock)]
    kinds = {type(conv) for block in blocks for conv in (block.conv1, block.conv2)}
    assert kinds == {StandardizedConv2d if standardized else nn.Conv2d}


def test_every_resblock_has_the_configured_dropout() -> None:
    assert {m.dropout.p for m in unet(dropout=0.25).modules() if isinstance(m, ResBlock)} == {0.25}


@pytest.mark.parametrize("scaled", [True, False])
def test_skips_are_scaled_where_configured(scaled: bool) -> None:
    model: Any = unet(scale_skips=scaled)
    made, joined = [], []
    for block in model.down[0].blocks:
        block.register_forward_hook(lambda _, __, result: made.append(result))
    model.up[-1].blocks[-1].register_forward_pre_hook(lambda _, arguments: joined.append(arguments[0]))
    model(*inputs(model))
    torch.testing.assert_close(joined[0][:, -16:], made[0] * (0.5**0.5 if scaled else 1.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("combines", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_the_last_block_reads_the_first_convolution_and_every_level_where_configured(
    combines: bool, residual: bool
) -> None:
    model: Any = unet(combine_up_features=combines, init_residual=residual)
    made, joined = {}, []
    model.conv_in.register_forward_hook(lambda _, __, result: made.update(first=result))
    if combines:
        model.combiner.register_forward_hook(lambda _, __, result: made.update(levels=torch.cat(result, dim=1)))
    model.final.register_forward_pre_hook(lambda _, arguments: joined.append(arguments[0]))
    model(*inputs(model))
    wanted = [made[name] for name, there in (("levels", combines), ("first", residual)) if there]
    assert joined[0].shape[1] == 16 * (1 + 2 * combines + residual)
    torch.testing.assert_close(joined[0][:, 16:], torch.cat([joined[0][:, :0], *wanted], dim=1), rtol=0, atol=0)


@torch.no_grad()
def test_channels_last_and_bfloat16_agree() -> None:
    model = unet(torch.float32)
    x, c_noise, conditioning = inputs(model, dtype=torch.float32)
    expected = model(x, c_noise, conditioning)
    fast = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(x.to(memory_format=torch.channels_last), c_noise, conditioning), expected,
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, c_noise, conditioning)
    assert float((rough.float() - expected).norm() / expected.norm()) < 0.05


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = unet()
    x, c_noise, conditioning = inputs(model, padded_to=13)
    with pytest.raises(ValueError, match=r"13 tokens, this model reads at most 12"):
        model(x, c_noise, conditioning)
    with pytest.raises(ValueError, match=r"multiples of 2 px"):
        model(x[..., :15], c_noise, conditioning)
    with pytest.raises(ValueError, match=r"conditioning\.text"):
        model(x, c_noise, Conditioning())
    with pytest.raises(ValidationError, match="attention_levels has 1 entries for 2 levels"):
        config(attention_levels=(True,))
    with pytest.raises(ValidationError, match=r"convs_after is for models with memory_efficient"):
        config(convs_after=True)
    with pytest.raises(ValidationError, match=r"init_kernels must rise and be odd \(got \(7, 3\)\)"):
        config(init_kernels=(7, 3))
    with pytest.raises(ValidationError, match=r"unread_caption_parameters is for models without captions"):
        config(unread_caption_parameters=True)


def test_the_configuration_survives_json() -> None:
    assert HybridUNetConfig.model_validate_json(config().model_dump_json()) == config()
