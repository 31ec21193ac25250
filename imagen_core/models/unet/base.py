"""What the configurations of all network families share."""

from typing import Literal

from pydantic import Field

from imagen_core.config import default_field
from imagen_core.models.conditioning.text import DroppedCaption, Pooling
from imagen_core.models.conditioning.text_layers import TextConfig, TextDim
from imagen_core.models.conditioning.transcription import TranscriptionConfig
from imagen_core.models.layers.activation import Activation

AttentionType = Literal["self", "cross", "fused", "stacked"]


class UNetBaseConfig(TextConfig):
    """A network's inputs and outputs: of the UNets, and of the patch transformer."""

    image_size_px: int = Field(ge=1)
    """Side in pixels of the images the model is designed for; it runs on any side that its levels divide."""
    text_dim: TextDim = 1024
    """Width of the text embeddings, or of each of their layers; null disables conditioning on text. A list: the widths
    of several encoders, whose tokens are projected to the largest of them and joined to one sequence."""
    text_embed_dim: int | None = Field(default=None, ge=1)
    """Width of each caption's one vector by another text encoder (CLIP, pooled or projected), which is projected and
    added to the time vector; null disables conditioning on it."""
    image_embed_dim: int | None = Field(default=None, ge=1)
    """Width of an image encoder's embeddings (DALL-E 2's decoder); null disables conditioning on them."""
    num_image_tokens: int = Field(default=4, ge=1)
    """Number of tokens that the image embedding becomes for attention; it is also added to the time vector."""
    num_classes: int | None = Field(default=None, ge=1)
    """Number of class labels; a label is embedded and added to the time vector, and -1 (unknown) adds nothing. null
    disables conditioning on labels."""
    transcription: TranscriptionConfig | None = None
    """Encoder of the text to be written in the image (Regular and Efficient UNets); null disables it."""
    in_channels: int = Field(default=3, ge=1)
    """Channels of the noisy image (without the low-resolution one)."""
    out_channels: int = Field(default=3, ge=1)
    """Channels of the output; twice in_channels for models with learned variance."""
    low_res: bool = False
    """Super-resolution: the upsampled low-resolution image is concatenated to the input."""
    low_res_noise: bool = False
    """The network receives the noise level of the low-resolution image."""
    self_conditioning: bool = False
    """An earlier estimate of the clean image is concatenated to the input (Chen et al. 2022, arXiv 2208.04202)."""
    condition_channels: int = Field(default=0, ge=0)
    """Channels of additional conditioning images, concatenated to the input (imagen-pytorch: cond_images_channels)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in ResBlocks."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    @property
    def needs_empty_caption(self) -> bool:
        """Whether the encoding of "" takes the place of a dropped caption."""
        return False

    @property
    def input_channels(self) -> int:
        """Channels of everything that is concatenated for the first convolution."""
        return self.in_channels * (1 + self.low_res + self.self_conditioning) + self.condition_channels

    def check_inputs(self) -> None:
        """Raises ValueError if an option is set without the one it needs."""
        self.check_text_layers()
        if self.low_res_noise and not self.low_res:
            raise ValueError("low_res_noise needs low_res")
        if self.needs_empty_caption and (not isinstance(self.text_dim, int) or self.text_embed_dim is not None):
            raise ValueError(
                "dropped_caption=empty_caption is for a model that reads captions as tokens of one encoder alone "
                f"(got text_dim {self.text_dim} and text_embed_dim {self.text_embed_dim})"
            )

    def check_image_size(self, levels: int, divisor: int) -> None:
        """Raises ValueError unless the levels divide image_size_px."""
        if self.image_size_px % divisor:
            raise ValueError(
                f"image_size_px must be a multiple of {divisor} for {levels} levels (got {self.image_size_px})"
            )


class AttentionUNetConfig(UNetBaseConfig):
    """What Regular and Efficient UNets share: levels with attention, and captions as tokens and as a pooled vector."""

    embed_dim: int = Field(ge=32)
    """Channels at multiplier 1, and width of the sinusoidal time embedding."""
    channel_mult: tuple[int | float, ...] = Field(min_length=1)
    """Channels of each level, in units of embed_dim, rounded down to whole channels."""
    attention_type: AttentionType = "fused"
    """fused: pixels attend to pixels and conditions at once; cross: to conditions only; stacked: a transformer block;
    self: to pixels only. Conditions are captions and image embeddings."""
    head_dim: int = Field(default=64, ge=1)
    """Channels of one attention head (NeMo: per_head_channels)."""
    num_heads: int | None = Field(default=None, ge=1)
    """Heads of every attention, instead of head_dim (NeMo: num_attn_heads)."""
    shared_norm: bool = default_field(False)
    """Fused attention has one norm for queries and the pixels' keys (DeepFloyd IF); false: a norm for each (NeMo)."""
    pooling: Pooling = "attention"
    """How the caption becomes one vector, added to the time vector: attention, a weighted mean of its tokens; mean;
    multihead, what the mean of the tokens attends to in them, with pooling_heads heads (DeepFloyd IF)."""
    pooling_heads: int = default_field(64, ge=1)
    """Heads of pooling=multihead; they divide the width of the text."""
    null_token: bool = False
    """Add one learned token to every caption (NeMo: use_null_token)."""
    padded_tokens: int | None = Field(default=None, ge=1)
    """Captions are padded with zeros to this number of tokens (NeMo: token_length): pooling includes the padding, mean
    pooling averages the projected tokens, and attention normalises groups of channels over all tokens. null: padding
    is always masked, and each token is normalised by itself."""
    dropped_caption: DroppedCaption = "zero_tokens"
    """What a row attends to when its caption is dropped: zero_tokens, a zero vector for each of its tokens (NeMo);
    no_tokens, nothing, so that the result does not depend on the caption's length either; empty_caption, the encoding
    of "" (DeepFloyd IF), which training takes from the store, and sampling from the store or the encoder."""
    learned_fourier_frequencies: int | None = None
    """Number of frequencies of a learned time embedding; null uses fixed sinusoids."""
    init_kernel_size: int = Field(default=3, ge=1)
    """Kernel side of the first convolution, in pixels; odd."""
    scale_shift: bool = True
    """The time vector scales and shifts the second norm of a ResBlock; false adds it before that norm."""
    activation: Activation = default_field("silu")
    """Activation of ResBlocks, of the time vector and before the output."""
    time_embed_dim: int | None = default_field(None, ge=1)
    """Width of the time vector; null: 4 times embed_dim."""
    time_activations: Literal[1, 2] = default_field(1)
    """How often the time vector is activated before ResBlocks project it; diffusers does so twice where it has an
    activation of its own and resnet_skip_time_act is false."""

    @property
    def time_dim(self) -> int:
        """Width of the time vector."""
        return self.time_embed_dim or 4 * self.embed_dim

    @property
    def needs_empty_caption(self) -> bool:
        return self.dropped_caption == "empty_caption"

    @property
    def sides_divisor(self) -> int:
        """Both sides of an image must be multiples of this, in pixels."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [int(self.embed_dim * mult) for mult in self.channel_mult]

    @property
    def sides_px(self) -> list[int]:
        """Side in pixels of each level's images, at image_size_px."""
        return [self.image_size_px // 2**level for level in range(len(self.channel_mult))]

    def check_conditions(self, *, attends: bool = True) -> None:
        """Raises ValueError if attention reads conditions that the model lacks, or if sizes do not fit together."""
        self.check_inputs()
        self.check_image_size(len(self.channel_mult), self.sides_divisor)
        if self.init_kernel_size % 2 == 0:
            raise ValueError(f"init_kernel_size must be odd (got {self.init_kernel_size})")
        if attends and self.attention_type != "self" and self.text_dim is None and self.image_embed_dim is None:
            raise ValueError(f"attention_type {self.attention_type!r} reads text, but text_dim is null; use 'self'")
        if self.pooling == "multihead" and self.text_width is not None and self.text_width % self.pooling_heads:
            raise ValueError(f"pooling_heads {self.pooling_heads} does not divide the text's width {self.text_width}")
        resolutions = () if self.transcription is None else self.transcription.resolutions
        if not set(resolutions) <= set(self.sides_px):
            raise ValueError(f"transcription.resolutions {resolutions}: the levels have sides of {self.sides_px} px")

    def head_width(self, width: int, num_heads: int | None = None) -> int:
        """Channels of one attention head at `width` channels; num_heads, given or the model's, takes precedence over
        head_dim."""
        num_heads = num_heads or self.num_heads
        return self.head_dim if num_heads is None else width // num_heads
