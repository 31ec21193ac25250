"""Configuration of the Hybrid UNets."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from imagen_core.models.unet.base import UNetBaseConfig

LevelAttention = bool | Literal["linear"]
_Count = Annotated[int, Field(ge=1)]


class HybridUNetSettings(UNetBaseConfig):
    """The settings of a Hybrid UNet, without `build`; see `HybridUNetConfig`."""

    family: Literal["hybrid"] = "hybrid"
    dim: int = Field(ge=8)
    """Channels at multiplier 1."""
    dim_mults: tuple[int, ...] = Field(min_length=1)
    """Channels of each level, in units of dim."""
    num_res_blocks: tuple[int, ...] = Field(min_length=1)
    """ResBlocks of each level after its first one."""
    attention_levels: tuple[LevelAttention, ...] = Field(min_length=1)
    """Levels that end with a transformer block; linear: its attention costs linearly many operations in the number of
    pixels (Shen et al. 2018, arXiv 1812.01243)."""
    cross_attention_levels: tuple[LevelAttention, ...] = Field(min_length=1)
    """Levels whose ResBlocks attend to the conditions."""
    conditions_in: Literal["first_block", "other_blocks"] = "first_block"
    """Which ResBlocks of these levels attend to the conditions; other_blocks: all but the first on the way down
    (DALLE2-pytorch)."""
    transformer_depth: int | tuple[int, ...] = 1
    """Layers of the transformer block of each level."""
    cond_dim: int | None = Field(default=None, ge=1)
    """Width of the condition tokens; null means dim."""
    text_in_middle_only: bool = False
    """Only the ResBlocks in the middle attend to the caption; all others attend to the other conditions
    (DALLE2-pytorch)."""
    caption_vector: bool = True
    """The pooled caption is added to the time vector."""
    unread_caption_parameters: bool = False
    """For imported and published models only: hold the null caption and the perceiver although text_dim is null. They
    are neither trained nor read, but such models contain and count them."""
    max_text_tokens: int = Field(default=256, ge=1, le=512)
    """Captions are padded to this length with learned tokens."""
    perceiver: bool = True
    """Resample captions to a fixed number of tokens, 36 by default; false attends to all of their tokens."""
    perceiver_num_latents: int = Field(default=32, ge=1)
    """Learned queries of the resampler; 4 tokens come from the caption's mean in addition."""
    perceiver_num_heads: int = Field(default=8, ge=1)
    """Number of attention heads of the resampler."""
    perceiver_head_dim: int = Field(default=64, ge=1)
    """Channels of one attention head of the resampler."""
    num_heads: _Count | tuple[_Count, ...] = 8
    """Number of attention heads, of all levels or of each; the middle has those of the last level."""
    head_dim: _Count | tuple[_Count, ...] = 64
    """Channels of one attention head, of all levels or of each."""
    cross_num_heads: int | None = Field(default=None, ge=1)
    """Number of attention heads of ResBlocks; null means num_heads."""
    cross_head_dim: int | None = Field(default=None, ge=1)
    """Channels of one attention head of ResBlocks; null means head_dim."""
    middle_cross_num_heads: int | None = Field(default=None, ge=1)
    """Number of attention heads of the ResBlocks in the middle; null means as in the others."""
    middle_cross_head_dim: int | None = Field(default=None, ge=1)
    """Channels of one attention head of the ResBlocks in the middle; null means as in the others."""
    ff_mult: int = Field(default=2, ge=0)
    """Width of the transformer blocks' feed-forward layers, in units of the block's width; 0 for attention alone."""
    attend_to_conditions: bool = True
    """Transformer blocks attend to the conditions in addition to the pixels."""
    middle_attention: bool = True
    """A transformer block, over pixels alone, between the two ResBlocks in the middle."""
    middle_feed_forward: bool = True
    """That block has a feed-forward layer, like the others; false for attention alone (MinImagen)."""
    middle_transformer_depth: int = Field(default=1, ge=1)
    """Layers of that block."""
    init_kernels: tuple[int, ...] = Field(default=(3, 7, 15), min_length=1)
    """Kernel sides of the first convolutions, in pixels, rising and odd; they run in parallel."""
    memory_efficient: bool = False
    """Change resolution before the ResBlocks of a level, not after them."""
    initial_res_block: bool = False
    """A ResBlock before the first level (memory-efficient models of imagen-pytorch and PaddleFleetX)."""
    convs_after: bool = False
    """With memory_efficient, a 1x1 convolution at the end of each level on the way down (DALLE2-pytorch)."""
    downsample: Literal["pixel_unshuffle", "conv", "cross_embed"] = "pixel_unshuffle"
    """Downsample by moving pixels into channels, by one strided convolution (MinImagen), or by two in parallel with
    kernels of 2 and 4 pixels."""
    upsample: Literal["pixel_shuffle", "repeat_conv"] = "pixel_shuffle"
    """Upsample by moving channels into pixels, or by repeating pixels before a convolution."""
    deepest_widen: Literal["two_convs", "conv"] = "two_convs"
    """How the deepest level widens without downsampling: a 3x3 and a 1x1 convolution, summed, or a 1x1 alone."""
    res_block: Literal["norm_first", "conv_first"] = "norm_first"
    """Order of norm, scale and shift, SiLU, and convolution in ResBlocks; conv_first is DALLE2-pytorch's."""
    weight_standardization: bool = False
    """Convolutions of ResBlocks have standardised weights (Qiao et al. 2019, arXiv 1903.10520)."""
    global_context: bool = True
    """Gate ResBlocks with global context (Cao et al. 2019, arXiv 1904.11492)."""
    final_global_context: bool = True
    """Gate the last ResBlock and initial_res_block with it too."""
    norm: Literal["group", "rms"] = "group"
    """Norm of the ResBlocks: group norm with 8 groups, or root mean square."""
    qk_norm: bool = False
    """Attention by cosine similarity."""
    num_fourier_frequencies: int | None = Field(default=8, ge=1)
    """Number of frequencies of a learned time embedding; null uses fixed sinusoids."""
    sinusoids: Literal["open", "closed"] = "open"
    """For imported models: the frequencies of fixed sinusoids, from 1, end one step before 1/10000 (open) or at it
    (closed, MinImagen)."""
    level_activation: Literal["silu", "gelu"] = "silu"
    """Activation between the two layers of the noise level's embedding; gelu is DALLE2-pytorch's."""
    low_res_at_end: bool = True
    """Concatenate the low-resolution image to the input of the last convolution too."""
    scale_skips: bool = True
    """Multiply skip connections by 1/sqrt(2)."""
    init_residual: bool = False
    """Concatenate the first convolution's output to the last ResBlock's input."""
    combine_up_features: bool = False
    """Concatenate the upsampled outputs of all levels on the way up to it too."""
    combine_at: Literal["level", "full"] = "level"
    """Where these outputs are narrowed: at their level's resolution, by group norm, SiLU and a convolution; or after
    upsampling, with the norm of the ResBlocks (full, imagen-pytorch)."""
    out_kernel_size: Literal[1, 3] = 3
    """Kernel side of the last convolution, in pixels."""

    @model_validator(mode="after")
    def _check(self) -> "HybridUNetSettings":
        levels = len(self.dim_mults)
        for name in ("num_res_blocks", "attention_levels", "cross_attention_levels"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {levels} levels of dim_mults")
        if self.dim % 8:
            raise ValueError(f"dim must be a multiple of 8 (got {self.dim})")
        for name in ("transformer_depth", "num_heads", "head_dim"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name} has {len(value)} entries for {levels} levels")
        if any(kernel % 2 == 0 for kernel in self.init_kernels) or list(self.init_kernels) != sorted(
            self.init_kernels
        ):
            raise ValueError(f"init_kernels must rise and be odd (got {self.init_kernels})")
        if self.convs_after and not self.memory_efficient:
            raise ValueError("convs_after is for models with memory_efficient, whose levels end with none")
        if self.transcription is not None:
            raise ValueError("transcription: Hybrid UNets read none; use family regular or efficient")
        self.check_inputs()
        self.check_image_size(levels, self.sides_divisor)
        if self.unread_caption_parameters and self.text_dim is not None:
            raise ValueError("unread_caption_parameters is for models without captions (text_dim: null)")
        return self

    def depth(self, level: int) -> int:
        """Layers of the transformer block of a level."""
        return self.transformer_depth if isinstance(self.transformer_depth, int) else self.transformer_depth[level]

    def heads(self, level: int) -> tuple[int, int]:
        """Number of attention heads of a level, and the channels of each; level -1 is the last one."""
        number, dim = self.num_heads, self.head_dim
        return number if isinstance(number, int) else number[level], dim if isinstance(dim, int) else dim[level]

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
        """Both sides of an image must be multiples of this, in pixels."""
        return 2 ** (len(self.dim_mults) if self.memory_efficient else len(self.dim_mults) - 1)
