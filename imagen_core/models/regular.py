"""The Regular UNet: ADM's U-shape with text attention, as Imagen's base models use it.

Dhariwal and Nichol 2021 (arXiv 2105.05233) for the body; Saharia et al. 2022 (arXiv 2205.11487), section 2
and appendix F, for the text. Every level has ResBlocks with attention at chosen resolutions; every output on
the way down is concatenated to an input on the way up.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from imagen_core.config import Config
from imagen_core.models.attention import zero_
from imagen_core.models.block import AttentionType, Block, Level, check_widths, head_width, make_attention
from imagen_core.models.conditioning import Conditioning
from imagen_core.models.inputs import Inputs, check_sides, join_low_res, run_block
from imagen_core.models.resblock import RepeatConv, Resample, ResBlock
from imagen_core.models.text import DroppedCaption, Pooling


class RegularUNetConfig(Config):
    """A Regular UNet."""

    family: Literal["regular"] = "regular"
    image_size_px: int = Field(ge=1)
    """Side the model is meant for; decides at which levels attention_resolutions lie."""
    embed_dim: int = Field(ge=32)
    """Channels at multiplier 1, and width of the sinusoidal time embedding."""
    channel_mult: tuple[int, ...] = Field(min_length=1)
    """Channels of each level, in units of embed_dim."""
    num_res_blocks: int | tuple[int, ...] = 3
    """ResBlocks of each level on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...] = (8, 16, 32)
    """Sides in pixels at which each ResBlock is followed by attention."""
    attention_type: AttentionType = "fused"
    """fused: pixels attend to pixels and text at once; stacked: a transformer block; self: no text attention."""
    head_dim: int = Field(default=64, ge=1)
    """Channels of one attention head (NeMo: per_head_channels)."""
    num_heads: int | None = Field(default=None, ge=1)
    """Heads of every attention, instead of head_dim (NeMo: num_attn_heads)."""
    text_dim: int | None = Field(default=1024, ge=1)
    """Width of the text embeddings; null: not conditioned on text."""
    cond_dim: int = Field(default=512, ge=1)
    """Width the text is projected to."""
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
    """Channels of the result; twice in_channels for models with learned variance."""
    low_res: bool = False
    """Super-resolution: the upsampled low-resolution picture is concatenated to the input."""
    low_res_noise: bool = False
    """A second time embedding for the noise level put on the low-resolution picture."""
    num_classes: int | None = None
    """Class labels, embedded and added to the time vector."""
    init_kernel_size: int = 3
    """Side of the first convolution."""
    scale_shift: bool = True
    """The time vector scales and shifts the second norm of a ResBlock; false: it is added."""
    resblock_updown: bool = False
    """Change resolution in ResBlocks."""
    resample_with_conv: bool = True
    """Halve with a strided convolution; false: average-pool. Not used with resblock_updown."""
    upsample: Literal["conv_transpose", "repeat_conv"] = "conv_transpose"
    """How to double, without resblock_updown."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in ResBlocks."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _check(self) -> "RegularUNetConfig":
        levels = len(self.channel_mult)
        if isinstance(self.num_res_blocks, tuple) and len(self.num_res_blocks) != levels:
            raise ValueError(f"num_res_blocks has {len(self.num_res_blocks)} entries for {levels} levels")
        if min(self.blocks_per_level) < 1:
            raise ValueError(f"num_res_blocks: every level needs one or more (got {self.num_res_blocks})")
        if self.image_size_px % self.sides_divisor:
            raise ValueError(
                f"image_size_px must be a multiple of {self.sides_divisor} for {levels} levels "
                f"(got {self.image_size_px})"
            )
        sides = [self.image_size_px // 2**level for level in range(levels)]
        attends = [side in self.attention_resolutions for side in sides[:-1]] + [True]  # the middle always
        widths = [self.embed_dim * mult for mult in self.channel_mult]
        check_widths(widths, attends, self.head_dim, self.num_heads)
        if self.text_dim is None and self.attention_type != "self":
            raise ValueError(f"attention_type {self.attention_type!r} reads text, but text_dim is null; use 'self'")
        if self.low_res_noise and not self.low_res:
            raise ValueError("low_res_noise needs low_res")
        return self

    @property
    def blocks_per_level(self) -> tuple[int, ...]:
        """num_res_blocks, one entry a level."""
        if isinstance(self.num_res_blocks, tuple):
            return self.num_res_blocks
        return (self.num_res_blocks,) * len(self.channel_mult)

    @property
    def time_dim(self) -> int:
        """Width of the time vector."""
        return 4 * self.embed_dim

    @property
    def sides_divisor(self) -> int:
        """What the sides of a picture must be a multiple of."""
        return 2 ** (len(self.channel_mult) - 1)

    def build(self) -> "RegularUNet":
        """A new model with random weights."""
        return RegularUNet(self)


class RegularUNet(nn.Module):
    """Predicts from a noisy picture, its noise level and the conditioning; what, the objective decides."""

    def __init__(self, config: RegularUNetConfig):
        super().__init__()
        self.config = config
        widths = [config.embed_dim * mult for mult in config.channel_mult]
        last = len(widths) - 1
        self.inputs = Inputs(
            config, config.embed_dim, config.cond_dim, attends_to_text=config.attention_type != "self"
        )
        channels = 2 * config.in_channels if config.low_res else config.in_channels
        kernel = config.init_kernel_size
        self.conv_in = nn.Conv2d(channels, widths[0], kernel, padding=kernel // 2)

        skips, width = [widths[0]], widths[0]
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            blocks = []
            for _ in range(config.blocks_per_level[level]):
                blocks.append(self._block(level, width, out))
                width = out
                skips.append(width)
            if level < last:
                skips.append(width)
            self.down.append(Level(blocks, self._resample("down", width) if level < last else None))

        self.middle = nn.ModuleList([Block(self._res(width, width), self._attention(width))])
        self.middle.append(Block(self._res(width, width), None))

        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            blocks = []
            for _ in range(config.blocks_per_level[level] + 1):
                blocks.append(self._block(level, width + skips.pop(), widths[level]))
                width = widths[level]
            self.up.append(Level(blocks, self._resample("up", width) if level else None))
        self.norm_out = nn.GroupNorm(32, width)
        self.conv_out = zero_(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        """x (b, in_channels, h, w), c_noise (b,) -> (b, out_channels, h, w).

        Raises:
            ValueError: sides that the levels do not divide, or a missing condition.
        """
        check_sides(x, self.config.sides_divisor)
        recompute = self.config.activation_checkpointing
        context = self.inputs(c_noise, conditioning)
        h = self.conv_in(join_low_res(x, conditioning, self.config.low_res))
        skips = [h]
        for level in Level.of(self.down):
            for block in level.blocks:
                h = run_block(block, h, context, recompute=recompute)
                skips.append(h)
            if level.resample is not None:
                h = run_block(level.resample, h, context, recompute=recompute)
                skips.append(h)
        for block in self.middle:
            h = run_block(block, h, context, recompute=recompute)
        for level in Level.of(self.up):
            for block in level.blocks:
                h = run_block(block, torch.cat([h, skips.pop()], dim=1), context, recompute=recompute)
            if level.resample is not None:
                h = run_block(level.resample, h, context, recompute=recompute)
        return self.conv_out(F.silu(self.norm_out(h)))

    def _block(self, level: int, in_channels: int, out_channels: int) -> "Block":
        side = self.config.image_size_px // 2**level
        attends = side in self.config.attention_resolutions
        return Block(self._res(in_channels, out_channels), self._attention(out_channels) if attends else None)

    def _res(self, in_channels: int, out_channels: int, resample: Resample = "none") -> ResBlock:
        return ResBlock(
            in_channels,
            out_channels,
            self.config.time_dim,
            dropout=self.config.dropout,
            scale_shift=self.config.scale_shift,
            resample=resample,
        )

    def _attention(self, width: int) -> nn.Module:
        config = self.config
        head_dim = head_width(width, config.head_dim, config.num_heads)
        return make_attention(config.attention_type, width, head_dim, config.cond_dim)

    def _resample(self, how: Resample, width: int) -> "Block":
        if self.config.resblock_updown:
            return Block(self._res(width, width, how), None)
        if how == "down":
            return Block(
                nn.Conv2d(width, width, 3, stride=2, padding=1) if self.config.resample_with_conv else nn.AvgPool2d(2),
                None,
            )
        if self.config.upsample == "conv_transpose":
            return Block(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), None)
        return Block(RepeatConv(width), None)
