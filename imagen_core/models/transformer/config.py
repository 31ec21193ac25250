"""Configuration of the patch transformer."""

from typing import Literal

from pydantic import Field, model_validator

from imagen_core.models.conditioning.text import DroppedCaption
from imagen_core.models.layers.gated import GatedActivation
from imagen_core.models.unet.base import UNetBaseConfig


class TransformerSettings(UNetBaseConfig):
    """The settings of a patch transformer, without `build`; see `TransformerConfig`."""

    family: Literal["transformer"] = "transformer"
    patch_px: int = Field(default=16, ge=1, le=64)
    """Side of a patch in pixels. A patch is one token, so a side twice as long is a quarter of the tokens."""
    bottleneck_dim: int | None = Field(default=128, ge=1)
    """Width of a linear layer between the pixels of a patch and its token (JiT); null: one linear layer."""
    bottleneck_bias: bool = False
    """That layer has a bias (PRX)."""
    dim: int = Field(ge=8)
    """Width of the tokens; a multiple of 4 times num_heads."""
    depth: int = Field(ge=1)
    """Number of blocks."""
    num_heads: int = Field(ge=1)
    """Number of attention heads; each has dim / num_heads channels."""
    mlp_ratio: float = Field(default=8 / 3, gt=0)
    """Width of the gated feed-forward layers in units of dim, rounded down to whole channels. 8/3 has as many
    parameters as a layer without a gate of 4 times dim."""
    mlp_activation: GatedActivation = "swiglu"
    """Activation of the gate of the feed-forward layers; geglu_tanh is PRX's."""
    norm: Literal["rms", "layer"] = "rms"
    """Norm of the tokens: root mean square with learned gains (JiT), or layer norm without (PRX)."""
    qk_norm: bool = True
    """Root mean square norm, with learned gains, of each head's queries and keys."""
    bias: bool = False
    """Biases in attention and in the feed-forward layers (JiT)."""
    attention_type: Literal["self", "cross", "fused"] = "fused"
    """fused: patches attend to patches and conditions at once, as one sequence (PRX); cross: to patches, and in a
    layer of its own to conditions; self: to patches only. Conditions are captions and image embeddings."""
    text_norm: bool = True
    """Root mean square norm, with learned gains, of the captions' embeddings before they are projected; false: none
    (PRX)."""
    dropped_caption: DroppedCaption = "no_tokens"
    """What a row attends to when its caption is dropped: no_tokens, nothing, so that the result does not depend on
    the caption's length; zero_tokens, a zero vector for each of its tokens; empty_caption, the encoding of "" (PRX),
    which training takes from the store, and sampling from the store or the encoder."""
    time: Literal["adaptive", "shared", "token"] = "adaptive"
    """How blocks read the noise level, labels and other vectors: adaptive, every block projects them to shifts, scales
    and gates of its layers, which are zero in a new model (Peebles and Xie 2022, arXiv 2212.09748, adaLN-Zero);
    shared, one projection for all blocks and a learned offset in each (Chen et al. 2023, arXiv 2310.00426, adaLN-
    single); token, as one more token."""
    time_sinusoids: int = Field(default=256, ge=2)
    """Width of the sinusoidal embedding of the noise level; even."""
    time_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Factor on the network's noise level before its embedding (PRX: 1000, for a time between 0 and 1)."""
    size_vector: bool = False
    """The height and width of the image in pixels are embedded and added to the time vector (PRX's pixel model)."""
    num_class_tokens: int = Field(default=0, ge=0)
    """Number of tokens that the class label becomes, besides being added to the time vector (JiT: in-context
    class tokens)."""
    class_tokens_from: int = Field(default=0, ge=0)
    """Block, counted from 0, whose input these tokens join."""
    rotary_theta: float = Field(default=10_000.0, gt=1, allow_inf_nan=False)
    """Ratio of the highest frequency of the rotary positions to where their series ends."""
    fixed_positions: bool = False
    """Fixed sinusoids of a patch's place are added to its token too (JiT)."""
    position_scaling: Literal["none", "area"] = "none"
    """Coordinates of patches at other sizes than image_size_px: none, the number of the row and of the column; area,
    these times the root of the ratio of the areas, so that an image of any size and shape spans the coordinates that
    training saw."""

    @model_validator(mode="after")
    def _check(self) -> "TransformerSettings":
        if self.dim % (4 * self.num_heads):
            raise ValueError(f"dim must be a multiple of 4 times num_heads (got {self.dim} and {self.num_heads})")
        if self.time_sinusoids % 2:
            raise ValueError(f"time_sinusoids must be even (got {self.time_sinusoids})")
        if self.mlp_dim < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} times dim {self.dim} is less than one channel")
        if self.transcription is not None:
            raise ValueError("transcription: a patch transformer reads none; use family regular or efficient")
        self.check_inputs()
        if self.image_size_px % self.patch_px:
            raise ValueError(f"image_size_px {self.image_size_px} must be a multiple of patch_px {self.patch_px}")
        reads = self.text_dim is not None or self.image_embed_dim is not None
        if self.attention_type == "self" and self.text_dim is not None:
            raise ValueError(f"attention_type self reads no captions, but text_dim is {self.text_dim}; set it to null")
        if self.attention_type != "self" and not reads:
            raise ValueError(f"attention_type {self.attention_type!r} reads text, but text_dim is null; use 'self'")
        if self.num_class_tokens and self.num_classes is None:
            raise ValueError(f"num_class_tokens is {self.num_class_tokens}, but num_classes is null; set both")
        if self.class_tokens_from >= self.depth or (self.class_tokens_from and not self.num_class_tokens):
            raise ValueError(
                f"class_tokens_from is {self.class_tokens_from}, for {self.num_class_tokens} num_class_tokens in "
                f"{self.depth} blocks, the first of which is 0"
            )
        return self

    @property
    def needs_empty_caption(self) -> bool:
        return self.dropped_caption == "empty_caption" and self.text_dim is not None

    @property
    def sides_divisor(self) -> int:
        """Both sides of an image must be multiples of this, in pixels."""
        return self.patch_px

    @property
    def mlp_dim(self) -> int:
        """Width of the feed-forward layers, after the gate."""
        return int(self.dim * self.mlp_ratio)

    @property
    def has_class_tokens(self) -> bool:
        """Whether the label becomes tokens."""
        return self.num_class_tokens > 0
