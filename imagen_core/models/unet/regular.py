"""The Regular UNet: ADM's U-shape with text attention, as Imagen's base models use it.

Dhariwal and Nichol 2021 (arXiv 2105.05233) for the body; Saharia et al. 2022 (arXiv 2205.11487), section 2
and appendix F, for the text. Every level has ResBlocks with attention at chosen resolutions; every output on
the way down is concatenated to an input on the way up.
"""

from typing import Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from imagen_core.config import default_field
from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.layers.activation import activate
from imagen_core.models.layers.attention import zero_
from imagen_core.models.layers.resblock import RepeatConv, Resample, ResBlock
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

Part = Literal["down", "middle", "up"]


class RegularUNetConfig(AttentionUNetConfig):
    """A Regular UNet."""

    family: Literal["regular"] = "regular"
    num_res_blocks: int | tuple[int, ...] = 3
    """ResBlocks of each level on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...] = (8, 16, 32)
    """Sides in pixels at which each ResBlock is followed by attention."""
    cond_dim: int = Field(default=512, ge=1)
    """Width that text tokens are projected to."""
    resblock_updown: bool = False
    """Change resolution in ResBlocks."""
    resblock_upsample: Literal["repeat", "conv_transpose"] = "repeat"
    """How ResBlocks upsample: by repeating pixels (ADM), or by a transposed convolution for each branch (NeMo)."""
    resample_with_conv: bool = True
    """Downsample with a strided convolution; false averages 2 x 2 pixels. Not used with resblock_updown."""
    upsample: Literal["conv_transpose", "repeat_conv"] = "conv_transpose"
    """How to upsample without resblock_updown."""
    block_divisor: float = default_field(1.0, gt=0)
    """The sum of a ResBlock's two branches is divided by it; sqrt(2) in DeepFloyd IF's super-resolution."""
    middle_divisor: float = default_field(1.0, gt=0)
    """The same for the ResBlocks between the way down and the way up."""
    up_num_heads: int | None = default_field(None, ge=1)
    """Heads of attention on the way up, if not those of the way down (ADM: num_heads_upsample)."""
    middle_num_heads: int | None = default_field(None, ge=1)
    """Heads of attention between the way down and the way up, if not those of the way down."""
    checkpointed_parts: tuple[Part, ...] = default_field(("down", "middle", "up"), min_length=1)
    """Where activation_checkpointing recomputes blocks."""

    @model_validator(mode="after")
    def _check(self) -> "RegularUNetConfig":
        levels = len(self.channel_mult)
        if isinstance(self.num_res_blocks, tuple) and len(self.num_res_blocks) != levels:
            raise ValueError(f"num_res_blocks has {len(self.num_res_blocks)} entries for {levels} levels")
        if min(self.blocks_per_level) < 1:
            raise ValueError(f"num_res_blocks: every level needs one or more (got {self.num_res_blocks})")
        self.check_conditions()
        attending = [side in self.attention_resolutions for side in self.sides_px]
        check_widths(self.widths, attending, self.head_dim, self.num_heads)
        check_widths(self.widths, attending, self.head_dim, self.up_num_heads or self.num_heads)
        middle = [False] * (len(attending) - 1) + [True]  # it always attends
        check_widths(self.widths, middle, self.head_dim, self.middle_num_heads or self.num_heads)
        return self

    @property
    def blocks_per_level(self) -> tuple[int, ...]:
        """num_res_blocks, with one entry per level."""
        if isinstance(self.num_res_blocks, tuple):
            return self.num_res_blocks
        return (self.num_res_blocks,) * len(self.channel_mult)

    def build(self) -> "RegularUNet":
        """A new model with random weights."""
        return RegularUNet(self)


class RegularUNet(AttentionUNet):
    """Every level has ResBlocks; every output on the way down is concatenated to an input on the way up."""

    config: RegularUNetConfig

    def __init__(self, config: RegularUNetConfig):
        super().__init__(config, config.cond_dim, attends=config.attention_type != "self")
        widths = config.widths
        last = len(widths) - 1
        skips, width = [widths[0]], widths[0]
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            blocks = []
            for _ in range(config.blocks_per_level[level]):
                blocks.append(self._block(level, width, out, up=False))
                width = out
                skips.append(width)
            if level < last:
                skips.append(width)
            self.down.append(Level(blocks, self._resample("down", width) if level < last else None))

        middle = [self._res(width, width, divisor=config.middle_divisor) for _ in range(2)]
        self.middle = nn.ModuleList(
            [Block(middle[0], self._attention(width, config.middle_num_heads)), Block(middle[1], None)]
        )

        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            blocks = []
            for _ in range(config.blocks_per_level[level] + 1):
                blocks.append(self._block(level, width + skips.pop(), widths[level], up=True))
                width = widths[level]
            self.up.append(Level(blocks, self._resample("up", width) if level else None))
        self.norm_out = nn.GroupNorm(32, width)
        self.conv_out = zero_(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        """x (b, in_channels, h, w), c_noise (b,) -> (b, out_channels, h, w).

        Raises:
            ValueError: the levels do not divide the sides, or a condition is missing.
        """
        h, context = self.stem(x, c_noise, conditioning)
        skips = [h]
        parts = {part: part in self.config.checkpointed_parts for part in get_args(Part)}
        for level in of_type(self.down, Level):
            for block in level.blocks:
                h = self.run(block, h, context, recompute=parts["down"])
                skips.append(h)
            if level.resample is not None:
                h = self.run(level.resample, h, context, recompute=parts["down"])
                skips.append(h)
        for block in self.middle:
            h = self.run(block, h, context, recompute=parts["middle"])
        for level in of_type(self.up, Level):
            for block in level.blocks:
                h = self.run(block, torch.cat([h, skips.pop()], dim=1), context, recompute=parts["up"])
            if level.resample is not None:
                h = self.run(level.resample, h, context, recompute=parts["up"])
        return self.conv_out(activate(self.norm_out(h), self.config.activation))

    def _block(self, level: int, in_channels: int, out_channels: int, *, up: bool) -> Block:
        attends = self.config.sides_px[level] in self.config.attention_resolutions
        return Block(
            self._res(in_channels, out_channels),
            self._attention(out_channels, self.config.up_num_heads if up else None) if attends else None,
            make_transcription_attention(self.config, level, out_channels, up=up),
        )

    def _res(
        self, in_channels: int, out_channels: int, resample: Resample = "none", divisor: float | None = None
    ) -> ResBlock:
        return ResBlock(
            in_channels,
            out_channels,
            self.config.time_dim,
            dropout=self.config.dropout,
            scale_shift=self.config.scale_shift,
            activation=self.config.activation,
            divisor=divisor or self.config.block_divisor,
            resample=resample,
        )

    def _attention(self, width: int, num_heads: int | None) -> nn.Module:
        return make_attention(self.config, width, self.config.cond_dim, num_heads)

    def _resample(self, how: Resample, width: int) -> Block:
        if self.config.resblock_updown:
            learned = how == "up" and self.config.resblock_upsample == "conv_transpose"
            return Block(self._res(width, width, "up_learned" if learned else how), None)
        if how == "down":
            return Block(
                nn.Conv2d(width, width, 3, stride=2, padding=1) if self.config.resample_with_conv else nn.AvgPool2d(2),
                None,
            )
        if self.config.upsample == "conv_transpose":
            return Block(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), None)
        return Block(RepeatConv(width), None)
