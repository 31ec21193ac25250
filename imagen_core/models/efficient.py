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

from imagen_core.config import Config
from imagen_core.models.block import AttentionType, Block, Level, check_widths, head_width, make_attention
from imagen_core.models.conditioning import Conditioning
from imagen_core.models.inputs import Inputs, check_sides, join_low_res, run_block
from imagen_core.models.resblock import ResBlock
from imagen_core.models.text import DroppedCaption, Pooling


class EfficientUNetConfig(Config):
    """An Efficient UNet. Text is projected to its own width, so there is no cond_dim."""

    family: Literal["efficient"] = "efficient"
    image_size_px: int = Field(ge=1)
    """Side the model is meant for; it runs on any side its levels divide, so also on crops."""
    embed_dim: int = Field(ge=32)
    """Channels at multiplier 1, and width of the sinusoidal time embedding."""
    channel_mult: tuple[int, ...] = Field(min_length=1)
    """Channels of each level, in units of embed_dim."""
    num_res_blocks: tuple[int, ...] = Field(min_length=1)
    """ResBlocks of each level, on the way down and on the way up."""
    attention_levels: tuple[bool, ...] = Field(min_length=1)
    """Levels whose ResBlocks are followed by attention."""
    attention_type: AttentionType = "fused"
    """fused: pixels attend to pixels and text at once; cross: to text only; stacked: a transformer block."""
    head_dim: int = Field(default=64, ge=1)
    """Channels of one attention head (NeMo: per_head_channels)."""
    num_heads: int | None = Field(default=None, ge=1)
    """Heads of every attention, instead of head_dim (NeMo: num_attn_heads)."""
    text_dim: int | None = Field(default=1024, ge=1)
    """Width of the text embeddings; null: not conditioned on text."""
    pooling: Pooling = "attention"
    """How the caption becomes one vector, added to the time vector."""
    null_token: bool = False
    """One learned token beside every caption (NeMo: use_null_token)."""
    dropped_caption: DroppedCaption = "zero_tokens"
    """What a row without its caption attends to: zero_tokens, as many zeros as the caption has tokens (NeMo); or
    no_tokens, so that it does not depend on the caption's length either."""
    learned_fourier_frequencies: int | None = None
    """Learned time embedding with so many frequencies; null: fixed sinusoids."""
    in_channels: int = Field(default=3, ge=1)
    """Channels of the noisy picture (without the low-resolution one)."""
    out_channels: int = Field(default=3, ge=1)
    """Channels of the result."""
    low_res: bool = True
    """Super-resolution: the upsampled low-resolution picture is concatenated to the input."""
    low_res_noise: bool = False
    """A second time embedding for the noise level put on the low-resolution picture."""
    num_classes: int | None = None
    """Class labels, embedded and added to the time vector."""
    up_narrow: Literal["first", "last"] = "first"
    """Which ResBlock of a level on the way up narrows to the width of the next level."""
    scale_skips: bool = True
    """Multiply the skip branches of ResBlocks by 1/sqrt(2)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in ResBlocks."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _check(self) -> "EfficientUNetConfig":
        levels = len(self.channel_mult)
        for name, values in (("num_res_blocks", self.num_res_blocks), ("attention_levels", self.attention_levels)):
            if len(values) != levels:
                raise ValueError(f"{name} has {len(values)} entries for {levels} levels of channel_mult")
        if min(self.num_res_blocks) < 1:
            raise ValueError(f"num_res_blocks: every level needs one or more (got {self.num_res_blocks})")
        if self.image_size_px % self.sides_divisor:
            raise ValueError(
                f"image_size_px must be a multiple of {self.sides_divisor} for {levels} levels "
                f"(got {self.image_size_px})"
            )
        widths = [self.embed_dim * mult for mult in self.channel_mult]
        for attending in (widths, [widths[0], *widths[:-1]]):  # on the way down, and up
            check_widths(attending, self.attention_levels, self.head_dim, self.num_heads)
        if self.text_dim is None and self.attention_type != "self" and any(self.attention_levels):
            raise ValueError(f"attention_type {self.attention_type!r} reads text, but text_dim is null; use 'self'")
        if self.low_res_noise and not self.low_res:
            raise ValueError("low_res_noise needs low_res")
        return self

    @property
    def time_dim(self) -> int:
        """Width of the time vector."""
        return 4 * self.embed_dim

    @property
    def sides_divisor(self) -> int:
        """What the sides of a picture must be a multiple of."""
        return 2 ** (len(self.channel_mult) - 1)

    def build(self) -> "EfficientUNet":
        """A new model with random weights."""
        return EfficientUNet(self)


class EfficientUNet(nn.Module):
    """Predicts from a noisy picture, its noise level and the conditioning; what, the objective decides."""

    def __init__(self, config: EfficientUNetConfig):
        super().__init__()
        self.config = config
        widths = [config.embed_dim * mult for mult in config.channel_mult]
        last = len(widths) - 1
        attends = any(config.attention_levels) and config.attention_type != "self"
        self.inputs = Inputs(config, config.embed_dim, config.text_dim or 0, attends_to_text=attends)
        channels = 2 * config.in_channels if config.low_res else config.in_channels
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            entry, count = widths[max(level - 1, 0)], config.num_res_blocks[level]
            halve = Block(nn.Conv2d(entry, entry, 4, stride=2, padding=1), None) if level < last else None
            self.down.append(Level(self._blocks(level, [entry] + count * [width]), halve))
            narrowing = [width] + count * [entry] if config.up_narrow == "first" else count * [width] + [entry]
            double = Block(nn.ConvTranspose2d(entry, entry, 4, stride=2, padding=1), None) if level < last else None
            self.up.insert(0, Level(self._blocks(level, narrowing), double))
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 1)

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        """x (b, in_channels, h, w), c_noise (b,) -> (b, out_channels, h, w).

        Raises:
            ValueError: sides that the levels do not divide, or a missing condition.
        """
        check_sides(x, self.config.sides_divisor)
        recompute = self.config.activation_checkpointing
        context = self.inputs(c_noise, conditioning)
        h = self.conv_in(join_low_res(x, conditioning, self.config.low_res))
        skips: list[Tensor] = []
        for level in Level.of(self.down):
            if level.resample is not None:
                h = run_block(level.resample, h, context, recompute=recompute)
            for block in level.blocks:
                h = run_block(block, h, context, recompute=recompute)
            skips.append(h)
        for depth, level in enumerate(Level.of(self.up)):
            h = h + skips.pop() if depth else skips.pop()
            for block in level.blocks:
                h = run_block(block, h, context, recompute=recompute)
            if level.resample is not None:
                h = run_block(level.resample, h, context, recompute=recompute)
        return self.conv_out(h)

    def _blocks(self, level: int, widths: list[int]) -> list[nn.Module]:
        """ResBlocks through these widths; attention after the last one if the level has it."""
        config = self.config
        blocks: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            attends = config.attention_levels[level] and index == len(widths) - 2
            layer = ResBlock(
                before,
                after,
                config.time_dim,
                dropout=config.dropout,
                always_project_skip=True,
                skip_scale=math.sqrt(0.5) if config.scale_skips else 1.0,
            )
            attention = None
            if attends:
                head_dim = head_width(after, config.head_dim, config.num_heads)
                attention = make_attention(config.attention_type, after, head_dim, config.text_dim or 0)
            blocks.append(Block(layer, attention))
        return blocks
