"""The Efficient UNet: its published parts and its shape."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from imagen_core.models.layers.resblock import ResBlock
from imagen_core.models.presets.unets import PRESETS
from imagen_core.models.unet.block import Level, of_type
from imagen_core.models.unet.efficient import EfficientUNet
from tests.imagen_core.models.count import build_on_meta
from tests.imagen_core.models.small import blocks_of, efficient, inputs, random_weights

SPLITS = {
    "600m_res_256": (328_704, 328_704, 1_052_673, 1_049_600, 789_504, 7_040, 398_187_008, 244_279_808, 387),
    "600m_res_1024": (328_704, 328_704, 1_052_673, 1_049_600, 789_504, 7_040, 393_984_512, 241_652_224, 387),
}


def size(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


@pytest.mark.parametrize("name", list(SPLITS))
def test_the_parts_of_published_models_have_their_published_sizes(name: str):
    unet = build_on_meta(PRESETS[name].config)
    assert isinstance(unet, EfficientUNet)
    text = unet.inputs.text
    assert text is not None
    parts = (
        size(unet.inputs.time),
        size(unet.inputs.low_res_time),
        size(text.pool, text.pooled),
        size(text.to_context),
        size(text.to_time),
        size(unet.conv_in),
        size(unet.down),
        size(unet.up),
        size(unet.conv_out),
    )
    assert parts == SPLITS[name]
    assert sum(parts) == PRESETS[name].parameters


def widths(unet: EfficientUNet, levels: nn.ModuleList) -> list[list[tuple[int, int]]]:
    """Input and output channels of each ResBlock, a list a level."""
    return [
        [(b.layer.conv1.in_channels, b.layer.conv1.out_channels) for b in blocks_of(level)]
        for level in of_type(levels, Level)
    ]


def test_up_blocks_narrow_first_or_last():
    options = {
        "image_size_px": 32,
        "channel_mult": (1, 2, 4),
        "num_res_blocks": (1, 2, 2),
        "attention_levels": [False] * 3,
    }
    first, last = (efficient(up_narrow=which, **options).build() for which in ("first", "last"))
    down = [[(32, 32)], [(32, 64), (64, 64)], [(64, 128), (128, 128)]]
    assert widths(first, first.down) == widths(last, last.down) == down
    assert widths(first, first.up) == [[(128, 64), (64, 64)], [(64, 32), (32, 32)], [(32, 32)]]
    assert widths(last, last.up) == [[(128, 128), (128, 64)], [(64, 64), (64, 32)], [(32, 32)]]


def test_resolution_changes_before_the_blocks_going_down_and_after_them_going_up():
    config = efficient()
    unet, seen = config.build(), []
    for block in unet.modules():
        if isinstance(block, ResBlock):
            block.register_forward_hook(lambda _, __, result: seen.append((result.shape[1], result.shape[2])))
    unet(*inputs(config))
    # 16 px are halved before the first level's blocks, the deepest level is not halved; then the way back
    assert seen == [(32, 8), (64, 8), (64, 8), (32, 8), (32, 8), (32, 8)]


def test_attention_follows_the_last_block_of_a_level():
    unet = efficient(num_res_blocks=(2, 3)).build()
    assert [[b.attention is not None for b in blocks_of(level)] for level in of_type(unet.down, Level)] == [
        [False, False],
        [False, False, True],
    ]
    assert [[b.attention is not None for b in blocks_of(level)] for level in of_type(unet.up, Level)] == [
        [False, False, True],
        [False, False],
    ]


def test_skips_are_added_not_joined():
    config = efficient(up_narrow="last")
    unet = config.build()
    assert blocks_of(of_type(unet.up, Level)[1])[0].layer.conv1.in_channels == 32


@pytest.mark.parametrize("scaled", [True, False])
def test_skip_branches_are_projected_and_scaled(scaled: bool):
    blocks = [m for m in efficient(scale_skips=scaled).build().modules() if isinstance(m, ResBlock)]
    assert all(isinstance(b.skip, nn.Conv2d) for b in blocks)
    assert {b.skip_scale for b in blocks} == {0.5**0.5 if scaled else 1.0}


def test_the_model_needs_no_low_resolution_image_if_so_configured():
    config = efficient(low_res=False)
    unet = random_weights(config.build())
    x, c_noise, conditioning = inputs(config)
    assert conditioning.low_res is None
    assert unet(x, c_noise, conditioning).shape == x.shape
    assert unet.conv_in.weight.shape[1] == 3


def test_every_level_needs_its_blocks_and_flags():
    with pytest.raises(ValidationError, match="attention_levels has 1 entries for 2 levels"):
        efficient(attention_levels=(True,))
    with pytest.raises(ValidationError, match="every level needs one or more"):
        efficient(num_res_blocks=(0, 1))


def test_up_attention_must_fit_the_narrowed_width():
    with pytest.raises(ValidationError, match="head_dim 64 does not divide the 32 channels"):
        efficient(head_dim=64)


def test_a_model_on_the_meta_device_holds_no_data():
    assert all(p.device == torch.device("meta") for p in build_on_meta(efficient()).parameters())
