"""The Hybrid UNet: the layout of imagen-pytorch, PaddleFleetX Imagen and MinImagen.

A ResBlock that reads the text, ResBlocks with a global-context gate, then a transformer block: that is a level.
Between levels pixels are shuffled into channels and back. Conditions are tokens; see `hybrid_text`.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from imagen_core.config import Config
from imagen_core.models.attention import Attention, to_picture, to_tokens
from imagen_core.models.block import Block
from imagen_core.models.conditioning import Conditioning
from imagen_core.models.hybrid_text import HybridInputs, feed_forward
from imagen_core.models.inputs import Context, check_sides, join_low_res, run_block
from imagen_core.models.resblock import RepeatConv, ResBlock


class HybridUNetConfig(Config):
    """A Hybrid UNet."""

    family: Literal["hybrid"] = "hybrid"
    image_size_px: int = Field(ge=1)
    """Side the model is meant for; it runs on any side its levels divide."""
    dim: int = Field(ge=8)
    """Channels at multiplier 1."""
    dim_mults: tuple[int, ...] = Field(min_length=1)
    """Channels of each level, in units of dim."""
    num_res_blocks: tuple[int, ...] = Field(min_length=1)
    """ResBlocks of each level beside the one that reads the text."""
    attention_levels: tuple[bool, ...] = Field(min_length=1)
    """Levels that end with a transformer block."""
    cross_attention_levels: tuple[bool, ...] = Field(min_length=1)
    """Levels whose first ResBlock attends to the conditions."""
    cond_dim: int | None = Field(default=None, ge=1)
    """Width of the condition tokens; null: dim."""
    text_dim: int | None = Field(default=1024, ge=1)
    """Width of the text embeddings; null: not conditioned on text."""
    unread_caption_parameters: bool = False
    """Hold the empty caption and the perceiver though text_dim is null, untrained and read by nothing: the published
    models without captions do, and count them."""
    max_text_tokens: int = Field(default=256, ge=1, le=512)
    """Captions are padded to this length with learned tokens."""
    perceiver: bool = True
    """Resample captions to 36 tokens; false: attend to all of them."""
    num_heads: int = Field(default=8, ge=1)
    """Attention heads."""
    head_dim: int = Field(default=64, ge=1)
    """Channels of one attention head."""
    ff_mult: int = Field(default=2, ge=1)
    """Width of the transformer blocks' feed-forward layers, in units of theirs."""
    attend_to_conditions: bool = True
    """Transformer blocks attend to the conditions beside the pixels."""
    middle_attention: bool = True
    """A transformer block, of pixels alone, between the two ResBlocks in the middle."""
    memory_efficient: bool = False
    """Change resolution before the ResBlocks of a level, not after them."""
    initial_res_block: bool = False
    """A ResBlock before the first level (memory-efficient models of imagen-pytorch and PaddleFleetX)."""
    pixel_shuffle: bool = True
    """Halve and double by shuffling pixels; false: strided and repeated convolutions (MinImagen)."""
    global_context: bool = True
    """Gate ResBlocks with global context (Cao et al. 2019, arXiv 1904.11492)."""
    final_global_context: bool = True
    """The same in the last ResBlock, and in initial_res_block."""
    norm: Literal["group", "rms"] = "group"
    """Norm of the ResBlocks: groups of 8, or root mean square."""
    qk_norm: bool = False
    """Attention by cosine similarity."""
    num_fourier_frequencies: int | None = Field(default=8, ge=1)
    """Learned time embedding; null: fixed sinusoids."""
    in_channels: int = Field(default=3, ge=1)
    """Channels of the noisy picture (without the low-resolution one)."""
    out_channels: int = Field(default=3, ge=1)
    """Channels of the result."""
    low_res: bool = False
    """Super-resolution: the upsampled low-resolution picture is concatenated to the input, and to the last layer's."""
    low_res_noise: bool = False
    """Tokens and a time embedding for the noise level put on the low-resolution picture."""
    low_res_at_end: bool = True
    """Concatenate the low-resolution picture to the input of the last convolution too."""
    scale_skips: bool = True
    """Multiply skip connections by 1/sqrt(2)."""
    num_classes: None = None
    """Class labels are not part of this family."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in ResBlocks."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _check(self) -> "HybridUNetConfig":
        levels = len(self.dim_mults)
        for name in ("num_res_blocks", "attention_levels", "cross_attention_levels"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {levels} levels of dim_mults")
        if self.dim % 8:
            raise ValueError(f"dim must be a multiple of 8 (got {self.dim})")
        if self.image_size_px % self.sides_divisor:
            raise ValueError(
                f"image_size_px must be a multiple of {self.sides_divisor} for {levels} levels "
                f"(got {self.image_size_px})"
            )
        if self.low_res_noise and not self.low_res:
            raise ValueError("low_res_noise needs low_res")
        if self.unread_caption_parameters and self.text_dim is not None:
            raise ValueError("unread_caption_parameters is for models without captions (text_dim: null)")
        return self

    @property
    def context_dim(self) -> int:
        """Width of the condition tokens."""
        return self.cond_dim or self.dim

    @property
    def time_dim(self) -> int:
        """Width of the time vector."""
        return (8 if self.low_res_noise else 4) * self.dim

    @property
    def sides_divisor(self) -> int:
        """What the sides of a picture must be a multiple of."""
        return 2 ** (len(self.dim_mults) if self.memory_efficient else len(self.dim_mults) - 1)

    def build(self) -> "HybridUNet":
        """A new model with random weights."""
        return HybridUNet(self)


class HybridUNet(nn.Module):
    """Predicts from a noisy picture, its noise level and the conditioning; what, the objective decides."""

    def __init__(self, config: HybridUNetConfig):
        super().__init__()
        self.config = config
        widths = [config.dim, *(config.dim * mult for mult in config.dim_mults)]
        self.inputs = HybridInputs(config)
        self.conv_in = CrossEmbed(config.in_channels * (2 if config.low_res else 1), config.dim)
        self.first = None
        if config.initial_res_block:
            self.first = Block(self._res(config.dim, config.dim, gate=config.final_global_context), None)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        last = len(config.dim_mults) - 1
        for level in range(last + 1):
            narrow, wide = widths[level], widths[level + 1]
            if config.memory_efficient:
                self.down.append(self._level(level, wide, before=self._halve(narrow, wide)))
            else:
                after = self._halve(narrow, wide) if level < last else TwoConvs(narrow, wide)
                self.down.append(self._level(level, narrow, after=after))
            doubles = level > 0 or config.memory_efficient
            self.up.insert(
                0,
                self._level(
                    level,
                    wide,
                    skip_width=wide if config.memory_efficient else narrow,
                    after=self._double(wide, narrow) if doubles else None,
                ),
            )
        middle = widths[-1]
        self.middle = nn.ModuleList([Block(self._res(middle, middle, text=True), None)])
        if config.middle_attention:
            self.middle.append(TransformerBlock(middle, config, attend_to_conditions=False))
        self.middle.append(Block(self._res(middle, middle, text=True), None))
        self.final = Block(self._res(config.dim, config.dim, gate=config.final_global_context), None)
        extra = config.in_channels if config.low_res and config.low_res_at_end else 0
        self.conv_out = nn.Conv2d(config.dim + extra, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        """x (b, in_channels, h, w), c_noise (b,) -> (b, out_channels, h, w).

        Raises:
            ValueError: sides that the levels do not divide, a missing condition, or a caption that is too long.
        """
        check_sides(x, self.config.sides_divisor)
        context = self.inputs(c_noise, conditioning)
        h = self.conv_in(join_low_res(x, conditioning, self.config.low_res))
        if self.first is not None:
            h = self._run(self.first, h, context)
        skips: list[Tensor] = []
        for level in HybridLevel.of(self.down):
            h = h if level.before is None else level.before(h)
            h = self._run(level.first, h, context)
            for block in level.blocks:
                h = self._run(block, h, context)
                skips.append(h)
            h = h if level.transformer is None else self._run(level.transformer, h, context)
            skips.append(h)
            h = h if level.after is None else level.after(h)
        for block in self.middle:
            h = self._run(block, h, context)
        scale = 0.5**0.5 if self.config.scale_skips else 1.0
        for level in HybridLevel.of(self.up):
            for block in (level.first, *level.blocks):
                h = self._run(block, torch.cat([h, scale * skips.pop()], dim=1), context)
            h = h if level.transformer is None else self._run(level.transformer, h, context)
            h = h if level.after is None else level.after(h)
        h = self._run(self.final, h, context)
        if self.config.low_res and self.config.low_res_at_end and conditioning.low_res is not None:
            h = torch.cat([h, conditioning.low_res.to(h.dtype)], dim=1)
        return self.conv_out(h)

    def _run(self, block: nn.Module, x: Tensor, context: Context) -> Tensor:
        return run_block(block, x, context, recompute=self.config.activation_checkpointing)

    def _level(
        self,
        level: int,
        width: int,
        *,
        skip_width: int = 0,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> "HybridLevel":
        config = self.config
        gated = config.global_context
        return HybridLevel(
            before=before,
            first=Block(self._res(width + skip_width, width, text=config.cross_attention_levels[level]), None),
            blocks=[
                Block(self._res(width + skip_width, width, gate=gated), None)
                for _ in range(config.num_res_blocks[level])
            ],
            transformer=self._transformer(width) if config.attention_levels[level] else None,
            after=after,
        )

    def _res(self, in_channels: int, out_channels: int, *, text: bool = False, gate: bool = False) -> ResBlock:
        config = self.config
        return ResBlock(
            in_channels,
            out_channels,
            config.time_dim,
            dropout=config.dropout,
            num_groups=8,
            norm=config.norm,
            zero_init=False,
            text_attention=TextAttention(out_channels, config) if text else None,
            gate=GlobalContext(out_channels) if gate else None,
        )

    def _transformer(self, width: int) -> "TransformerBlock":
        return TransformerBlock(width, self.config, attend_to_conditions=self.config.attend_to_conditions)

    def _halve(self, width: int, out_width: int) -> nn.Module:
        if self.config.pixel_shuffle:
            return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, out_width, 1))
        return nn.Conv2d(width, out_width, 4, stride=2, padding=1)

    def _double(self, width: int, out_width: int) -> nn.Module:
        if self.config.pixel_shuffle:
            return nn.Sequential(nn.Conv2d(width, 4 * out_width, 1), nn.SiLU(), nn.PixelShuffle(2))
        return RepeatConv(width, out_width)


class HybridLevel(nn.Module):
    """One resolution, on the way down or up."""

    def __init__(
        self,
        *,
        before: nn.Module | None,
        first: nn.Module,
        blocks: list[Block],
        transformer: nn.Module | None,
        after: nn.Module | None,
    ):
        super().__init__()
        self.before, self.first, self.blocks = before, first, nn.ModuleList(blocks)
        self.transformer, self.after = transformer, after

    @staticmethod
    def of(levels: nn.ModuleList) -> list["HybridLevel"]:
        """The levels of a list, with their type."""
        return [level for level in levels if isinstance(level, HybridLevel)]


class CrossEmbed(nn.Module):
    """Convolutions with kernels of 3, 7 and 15 pixels side by side."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        parts = [out_channels // 2, out_channels // 4, out_channels - out_channels // 2 - out_channels // 4]
        self.convs = nn.ModuleList(
            [nn.Conv2d(in_channels, part, k, padding=k // 2) for part, k in zip(parts, (3, 7, 15), strict=True)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], dim=1)


class TwoConvs(nn.Module):
    """A 3x3 and a 1x1 convolution, summed: the deepest level widens without halving."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.wide = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.narrow = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.narrow(x)


class TextAttention(nn.Module):
    """Pixels attend to the condition tokens; normed before and after, with a residual."""

    def __init__(self, width: int, config: HybridUNetConfig):
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(
            width,
            kind="cross",
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            context_dim=config.context_dim,
            bias=False,
            null_kv=True,
            qk_norm=config.qk_norm,
        )
        self.norm_out = nn.LayerNorm(width, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(b, c, h, w) -> the same."""
        attended = self.attention(self.norm(to_tokens(x)), context.tokens, context.mask)
        return x + to_picture(self.norm_out(attended), x)


class TransformerBlock(nn.Module):
    """Multi-query attention over pixels and condition tokens, then a feed-forward layer; both with residuals."""

    def __init__(self, width: int, config: HybridUNetConfig, *, attend_to_conditions: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.norm_context = nn.LayerNorm(config.context_dim) if attend_to_conditions else None
        self.attention = Attention(
            width,
            kind="fused" if attend_to_conditions else "self",
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            context_dim=config.context_dim,
            num_kv_heads=1,
            bias=False,
            context_bias=True,
            null_kv=True,
            qk_norm=config.qk_norm,
        )
        self.norm_out = nn.LayerNorm(width, bias=False)
        self.feed_forward = feed_forward(width, config.ff_mult)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(b, c, h, w) -> the same."""
        tokens, conditions = to_tokens(x), context.tokens
        if self.norm_context is not None and conditions is not None:
            conditions = self.norm_context(conditions)
        tokens = tokens + self.norm_out(self.attention(self.norm(tokens), conditions, context.mask))
        return to_picture(tokens + self.feed_forward(tokens), x)


class GlobalContext(nn.Module):
    """Scales channels by a gate made of an attention-pooled pixel (Cao et al. 2019, arXiv 1904.11492)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = max(3, width // 2)
        self.score = nn.Conv2d(width, 1, 1)
        self.gate = nn.Sequential(nn.Conv2d(width, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> the same."""
        weights = self.score(x).flatten(2).softmax(dim=-1)  # (b, 1, h * w)
        pooled = torch.einsum("bcn,bn->bc", x.flatten(2), weights[:, 0])
        return x * self.gate(pooled[:, :, None, None])
