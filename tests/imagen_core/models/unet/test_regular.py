"""The Regular UNet: its published parts, its shape and its options."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from imagen_core.models.layers.attention import Attention
from imagen_core.models.layers.resblock import RepeatConv, ResBlock
from imagen_core.models.presets.unets import PRESETS
from imagen_core.models.unet.block import Block, Level, of_type
from imagen_core.models.unet.regular import RegularUNet
from tests.imagen_core.models.count import build_on_meta
from tests.imagen_core.models.small import NO_EFFECT, blocks_of, calls_of, inputs, random_weights, regular

# time, low-res time, pooling, tokens, pooled text to time, down with the first convolution, middle, up, end
SPLITS = {
    "500m_res_64": (1_312_768, 0, 527_873, 524_800, 1_575_936, 156_190_464, 47_213_568, 317_544_704, 7_427),
    "2b_res_64": (
        5_246_976, 0, 2_102_273, 2_099_200, 8_396_800, 652_793_344, 192_995_328, 1_307_513_344, 14_851,
    ),
    "400m_res_256": (
        328_704, 328_704, 527_873, 524_800, 526_336, 127_156_480, 25_973_248, 252_980_608, 3_715,
    ),
}  # fmt: skip


def size(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


@pytest.mark.parametrize("name", list(SPLITS))
def test_the_parts_of_published_models_have_their_published_sizes(name: str):
    unet = build_on_meta(PRESETS[name].config)
    assert isinstance(unet, RegularUNet)
    text = unet.inputs.text
    assert text is not None
    parts = (
        size(unet.inputs.time),
        size(unet.inputs.low_res_time),
        size(text.pool, text.pooled),
        size(text.to_context),
        size(text.to_time),
        size(unet.conv_in, unet.down),
        size(unet.middle),
        size(unet.up),
        size(unet.norm_out, unet.conv_out),
    )
    assert parts == SPLITS[name]
    assert sum(parts) == PRESETS[name].parameters


def test_the_500m_model_has_the_published_blocks():
    unet = build_on_meta(PRESETS["500m_res_64"].config)
    assert isinstance(unet, RegularUNet)
    blocks = [m for m in unet.modules() if isinstance(m, ResBlock)]
    attentions = [m.attention for m in unet.modules() if isinstance(m, Block) and m.attention is not None]
    down = [level.resample for level in of_type(unet.down, Level) if level.resample is not None]
    up = [level.resample for level in of_type(unet.up, Level) if level.resample is not None]
    assert (len(blocks), len(attentions), len(down), len(up)) == (30, 22, 3, 3)
    millions = [size(*group) / 1e6 for group in (blocks, attentions, down, up)]  # type: ignore[arg-type]
    assert millions == [pytest.approx(value, abs=0.005) for value in (407.10, 75.17, 8.26, 30.41)]


def test_a_new_model_predicts_zero():
    config = regular()
    assert not config.build()(*inputs(config)).any()


def test_attention_is_at_the_listed_resolutions_and_in_the_middle():
    unet = regular(
        image_size_px=32, channel_mult=(1, 1, 2), num_res_blocks=(1, 2, 1), attention_resolutions=(16,)
    ).build()
    assert [[b.attention is not None for b in blocks_of(level)] for level in of_type(unet.down, Level)] == [
        [False],
        [True] * 2,
        [False],
    ]
    assert [[b.attention is not None for b in blocks_of(level)] for level in of_type(unet.up, Level)] == [
        [False] * 2,
        [True] * 3,
        [False] * 2,
    ]
    assert [b.attention is not None for b in unet.middle] == [True, False]


@pytest.mark.parametrize(
    "options",
    [
        {"resblock_updown": True, "scale_shift": False},
        {"resample_with_conv": False, "upsample": "repeat_conv"},
        {"init_kernel_size": 7, "num_res_blocks": 2},
    ],
    ids=str,
)
def test_ways_to_change_resolution_all_train(options: dict[str, object]):
    config = regular(**options)
    unet = random_weights(config.build())
    unet(*inputs(config)).square().mean().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name in NO_EFFECT, name


@pytest.mark.parametrize(
    ("options", "halves", "doubles"),
    [
        ({}, nn.Conv2d, nn.ConvTranspose2d),
        ({"resample_with_conv": False}, nn.AvgPool2d, nn.ConvTranspose2d),
        ({"upsample": "repeat_conv"}, nn.Conv2d, RepeatConv),
        ({"resblock_updown": True}, ResBlock, ResBlock),
    ],
    ids=["convolutions", "average", "repeat", "resblocks"],
)
def test_resolution_is_changed_by_the_configured_layers(options: dict[str, object], halves: type, doubles: type):
    unet = regular(**options).build()
    assert type(of_type(unet.down, Level)[0].resample.layer) is halves
    assert type(of_type(unet.up, Level)[0].resample.layer) is doubles


def test_low_resolution_changes_halve_and_double():
    config = regular()
    unet = config.build()
    seen: list[torch.Size] = []
    for block in unet.modules():
        if isinstance(block, ResBlock):
            block.register_forward_hook(lambda _, __, result: seen.append(result.shape))
    unet(*inputs(config))
    widths = [(32, 16), (64, 8), (64, 8), (64, 8), (64, 8), (64, 8), (32, 16), (32, 16)]
    assert [(shape[1], shape[2]) for shape in seen] == widths


def test_all_outputs_on_the_way_down_are_used_on_the_way_up():
    """ADM's skips: first convolution, every block, every step down."""
    config = regular(num_res_blocks=(2, 1))
    first = [
        block.layer.conv1.in_channels for level in of_type(config.build().up, Level) for block in blocks_of(level)
    ]
    #        deepest: (64 + 64), (64 + 32);   top: (64 + 32), (32 + 32), (32 + 32)
    assert first == [128, 96, 96, 64, 64]


def test_a_divisor_of_the_middle_is_apart_from_that_of_the_levels():
    unet = regular(block_divisor=2.0, middle_divisor=3.0, resblock_updown=True).build()
    divisors = {name: block.divisor for name, block in unet.named_modules() if isinstance(block, ResBlock)}
    assert {divisor for name, divisor in divisors.items() if name.startswith("middle")} == {3.0}
    assert {divisor for name, divisor in divisors.items() if not name.startswith("middle")} == {2.0}


def test_queries_and_keys_share_a_norm_where_configured():
    apart, shared = regular().build(), regular(shared_norm=True).build()
    names = {name for name, _ in apart.named_parameters()} - {name for name, _ in shared.named_parameters()}
    assert len(names) == 2 * 4, "weight and bias of the level's three attentions and the middle's"
    assert all(".norm_keys." in name for name in names)


def test_heads_differ_by_part_where_configured():
    def heads(**options: object) -> list[list[int]]:
        unet = regular(**options).build()
        parts = (unet.down, unet.middle, unet.up)
        return [[m.num_heads for m in part.modules() if isinstance(m, Attention)] for part in parts]

    assert heads() == [[4], [4], [4, 4]]
    assert heads(up_num_heads=2, middle_num_heads=8) == [[4], [8], [2, 2]]
    assert heads(num_heads=1, up_num_heads=16) == [[1], [1], [16, 16]]
    for option in ("up_num_heads", "middle_num_heads"):
        with pytest.raises(ValidationError, match="num_heads 5 does not divide the 64 channels"):
            regular(**{option: 5})


@pytest.mark.parametrize("part", ["down", "middle", "up"])
def test_blocks_are_computed_again_in_the_configured_parts_only(part: str):
    config = regular(activation_checkpointing=True, checkpointed_parts=(part,))
    unet = random_weights(config.build())
    named = {name: module for name, module in unet.named_modules() if isinstance(module, Block)}
    _, backward = calls_of(list(named.values()), unet, *inputs(config))
    assert dict(zip(named, backward, strict=True)) == {name: int(name.startswith(part)) for name in named}


def test_channels_of_a_level_may_be_a_fraction_of_the_width():
    """ADM's 512 px models: half the width at the first level, and sinusoids of the full width."""
    config = regular(embed_dim=64, channel_mult=(0.5, 1, 1.5))
    assert config.widths == [32, 64, 96]
    unet = config.build()
    assert (unet.conv_in.out_channels, unet.norm_out.num_channels) == (32, 32)
    assert unet.inputs.time.embedding.out_dim == 64
    assert regular().model_dump_json() == regular(channel_mult=[1, 2]).model_dump_json()
    assert '"channel_mult":[1,2]' in regular().model_dump_json(), "as in records of earlier versions"


def test_options_at_their_defaults_leave_no_trace_in_a_record():
    """So that checkpoints of earlier versions are of the same model."""
    later = {"shared_norm", "pooling_heads", "activation", "time_embed_dim", "time_activations"}
    later |= {"block_divisor", "middle_divisor", "up_num_heads", "middle_num_heads", "checkpointed_parts"}
    assert later <= set(type(regular()).model_fields)
    assert not later & regular().model_dump().keys()
    assert regular(activation="gelu").model_dump()["activation"] == "gelu"
