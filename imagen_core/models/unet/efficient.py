"""The Efficient UNet of Imagen's super-resolution models.

Saharia et al. 2022 (arXiv 2205.11487), appendix B.1: parameters move from the high resolutions to the low
ones, the resolution changes before the convolutions on the way down and after them on the way up, and skip
connections are scaled by 1/sqrt(2).
"""

import math
from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.layers.resblock import ResBlock
from imagen_core.models.unet.attention_unet import AttentionUNet
from imagen_core.models.unet.base import AttentionUNetConfig
from imagen_core.models.unet.block import (
    Block,
    Level,
    check_widths,
    make_attention,
    make_transcription_attention,
    of_type,
)


class EfficientUNetConfig(AttentionUNetConfig):
    """An Efficient UNet. Text is projected to its own width, so there is no cond_dim."""

    family: Literal["efficient"] = "efficient"
    low_res: bool = True
    """Super-resolution: the upsampled low-resolution image is concatenated to the input."""
    num_res_blocks: tuple[int, ...] = Field(min_length=1)
    """ResBlocks of each level, on the way down and on the way up."""
    attention_levels: tuple[bool, ...] = Field(min_length=1)
    """Levels whose ResBlocks are followed by attention."""
    up_narrow: Literal["first", "last"] = "first"
    """Which ResBlock of a level on the way up narrows to the width of the next level."""
    scale_skips: bool = True
    """Multiply the skip branches of ResBlocks by 1/sqrt(2)."""

    @model_validator(mode="after")
    def _check(self) -> "EfficientUNetConfig":
        levels = len(self.channel_mult)
        for name, values in (("num_res_blocks", self.num_res_blocks), ("attention_levels", self.attention_levels)):
            if len(values) != levels:
                raise ValueError(f"{name} has {len(values)} entries for {levels} levels of channel_mult")
        if min(self.num_res_blocks) < 1:
            raise ValueError(f"num_res_blocks: every level needs one or more (got {self.num_res_blocks})")
        self.check_conditions(attends=any(self.attention_levels))
        widths = self.widths
        for attending in (widths, [widths[0], *widths[:-1]]):  # on the way down, and up
            check_widths(attending, self.attention_levels, self.head_dim, self.num_heads)
        return self

    @property
    def sides_px(self) -> list[int]:
        """Side in pixels of each level's images; all but the last level downsample before their blocks."""
        last = len(self.channel_mult) - 1
        return [self.image_size_px // 2 ** min(level + 1, last) for level in range(last + 1)]

    @property
    def context_dim(self) -> int:
        """Width of the tokens that are attended to."""
        of_text = self.text_width if isinstance(self.text_dim, tuple) else self.text_dim
        return of_text or self.image_embed_dim or 0

    def build(self) -> "EfficientUNet":
        """A new model with random weights."""
        return EfficientUNet(self)


class EfficientUNet(AttentionUNet):
    """Attention follows the last ResBlock of a level; the output of each level is added to its counterpart's input."""

    config: EfficientUNetConfig

    def __init__(self, config: EfficientUNetConfig):
        attends = any(config.attention_levels) and config.attention_type != "self"
        super().__init__(config, config.context_dim, attends=attends)
        widths = config.widths
        last = len(widths) - 1
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            entry, count = widths[max(level - 1, 0)], config.num_res_blocks[level]
            downsample = Block(nn.Conv2d(entry, entry, 4, stride=2, padding=1), None) if level < last else None
            self.down.append(Level(self._blocks(level, [entry] + count * [width], up=False), downsample))
            narrowing = [width] + count * [entry] if config.up_narrow == "first" else count * [width] + [entry]
            upsample = Block(nn.ConvTranspose2d(entry, entry, 4, stride=2, padding=1), None) if level < last else None
            self.up.insert(0, Level(self._blocks(level, narrowing, up=True), upsample))
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 1)

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        """x (b, in_channels, h, w), c_noise (b,) -> (b, out_channels, h, w).

        Raises:
            ValueError: the levels do not divide the sides, or a condition is missing.
        """
        h, context = self.stem(x, c_noise, conditioning)
        skips: list[Tensor] = []
        for level in of_type(self.down, Level):
            if level.resample is not None:
                h = self.run(level.resample, h, context)
            for block in level.blocks:
                h = self.run(block, h, context)
            skips.append(h)
        for depth, level in enumerate(of_type(self.up, Level)):
            h = h + skips.pop() if depth else skips.pop()
            for block in level.blocks:
                h = self.run(block, h, context)
            if level.resample is not None:
                h = self.run(level.resample, h, context)
        return self.conv_out(h)

    def _blocks(self, level: int, widths: list[int], *, up: bool) -> list[nn.Module]:
        """ResBlocks through these widths; attention after the last one if the level has it."""
        config = self.config
        blocks: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            last = index == len(widths) - 2
            layer = ResBlock(
                before,
                after,
                config.time_dim,
                scale_shift=config.scale_shift,
                dropout=config.dropout,
                activation=config.activation,
                always_project_skip=True,
                skip_scale=math.sqrt(0.5) if config.scale_skips else 1.0,
            )
            attention = None
            if last and config.attention_levels[level]:
                attention = make_attention(config, after, config.context_dim)
            to_transcription = make_transcription_attention(config, level, after, up=up) if last else None
            blocks.append(Block(layer, attention, to_transcription))
        return blocks
