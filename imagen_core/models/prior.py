"""DALL-E 2's prior: a causal transformer that generates an image's embedding from its caption.

Ramesh et al. 2022 (arXiv 2204.06125), section 2.2: the sequence is the caption's tokens, its embedding, the noise
level, the noisy image embedding, and a query whose output is the prediction.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning, keep_mask
from imagen_core.models.conditioning.text import pad_with_learned
from imagen_core.models.conditioning.text_layers import TextConfig, TextDim
from imagen_core.models.layers.noise_embedding import SinusoidalEmbedding
from imagen_core.models.layers.positions import RelativePositionBias, Rotary
from imagen_core.models.layers.transformer import TransformerLayer

_COSINE_SCALE = 16.0
_ROTARY_WIDTH = 32


class PriorNetworkConfig(TextConfig):
    """The transformer of a prior."""

    family: Literal["prior"] = "prior"
    dim: int = Field(ge=2)
    """Width of the image embeddings, of the captions' embeddings, and of the transformer."""
    depth: int = Field(ge=1)
    """Number of transformer layers."""
    num_heads: int = Field(default=8, ge=1)
    """Number of attention heads."""
    head_dim: int = Field(default=64, ge=2)
    """Channels of one attention head."""
    ff_mult: int = Field(default=4, ge=1)
    """Width of the feed-forward layers (SwiGLU), in units of dim."""
    text_dim: TextDim = None
    """Width of the captions' token embeddings, or of each of their layers; null reads only each caption's single
    embedding. A list: the widths of several encoders, whose tokens are projected to the largest of them and joined to
    one sequence."""
    max_text_tokens: int = Field(default=256, ge=1)
    """Captions are padded to this length with learned tokens."""
    learned_text_tokens: bool = False
    """For imported models: these learned tokens are there although text_dim is null (DALLE2-pytorch without
    condition_on_text_encodings)."""
    unit_text_embed: bool = False
    """For imported models: captions' embeddings are read as unit vectors (DALLE2-pytorch); else each of their
    components has variance 1."""
    num_timesteps: int | None = Field(default=None, ge=1)
    """Steps of a discrete schedule, each with a learned embedding; null embeds the noise level of any schedule by
    sinusoids."""
    num_time_tokens: int = Field(default=1, ge=1)
    """Number of tokens of the noise level."""
    sinusoids: Literal["open", "closed"] = "open"
    """For imported models: the frequencies of sinusoids, from 1, end one step before 1/10000 (open) or at it (closed,
    DALLE2-pytorch)."""
    num_image_tokens: int = Field(default=1, ge=1)
    """Number of tokens of the noisy image embedding."""
    num_text_embed_tokens: int = Field(default=1, ge=1)
    """Number of tokens of the caption's embedding."""
    self_conditioning: bool = False
    """One more token: an earlier estimate of the embedding (Chen et al. 2022, arXiv 2208.04202)."""
    cosine_attention: bool = True
    """Attention by cosine similarity; false divides by the root of a head's width (DALLE2-pytorch before 1.4.3)."""
    rotary: bool = True
    """Rotary positions in addition to the relative position bias."""
    null_position: bool = False
    """For imported models: the null key has a position in this bias, before the first token, so that the distances to
    all keys are one less (DALLE2-pytorch)."""
    ff_norm: bool = False
    """A norm within the feed-forward layers (DALLE2-pytorch: normformer)."""
    norm_out: bool = True
    """A norm after the last layer."""
    stable_norm_out: bool = False
    """That norm divides by the largest component first (DALLE2-pytorch)."""
    final_projection: bool = True
    """A linear layer at the end."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in the feed-forward layers."""

    @model_validator(mode="after")
    def _check(self) -> "PriorNetworkConfig":
        self.check_text_layers()
        if self.learned_text_tokens and self.text_dim is not None:
            raise ValueError("learned_text_tokens is for models without captions' tokens (text_dim: null)")
        return self

    def build(self) -> "PriorNetwork":
        """A new model with random weights."""
        return PriorNetwork(self)


class PriorNetwork(nn.Module):
    """Predicts from a noisy image embedding, its noise level and the caption; the objective decides what."""

    def __init__(self, config: PriorNetworkConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.to_text_tokens = None
        self.text_layers = config.build_text_layers()
        if config.text_width is not None and config.text_width != dim:
            self.to_text_tokens = nn.Linear(config.text_width, dim)
        self.to_text_embed = _to_tokens(dim, config.num_text_embed_tokens)
        self.to_image = _to_tokens(dim, config.num_image_tokens)
        self.steps = self.sinusoids = None
        time_width = dim * config.num_time_tokens
        if config.num_timesteps is not None:
            self.steps = nn.Embedding(config.num_timesteps, time_width)
        else:
            hidden = 2 * time_width
            self.sinusoids = SinusoidalEmbedding(dim, closed=config.sinusoids == "closed")
            self.to_time = nn.Sequential(
                nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, time_width)
            )
        self.query = nn.Parameter(torch.randn(dim))
        self.null_text_tokens = None
        if config.text_dim is not None or config.learned_text_tokens:
            self.null_text_tokens = nn.Parameter(torch.randn(config.max_text_tokens, dim))
        self.null_text_embed = nn.Parameter(torch.randn(config.num_text_embed_tokens, dim))
        self.null_image = nn.Parameter(torch.randn(dim))
        self.bias = RelativePositionBias(config.num_heads, bidirectional=False)
        self.rotary = Rotary(min(_ROTARY_WIDTH, config.head_dim)) if config.rotary else None
        self.layers = nn.ModuleList(
            [
                TransformerLayer(
                    dim,
                    num_heads=config.num_heads,
                    head_dim=config.head_dim,
                    ff_mult=config.ff_mult,
                    activation="swiglu",
                    ff_norm=config.ff_norm,
                    qk_norm=_COSINE_SCALE if config.cosine_attention else False,
                    causal=True,
                    dropout=config.dropout,
                )
                for _ in range(config.depth)
            ]
        )
        self.norm_out = nn.LayerNorm(dim, bias=False) if config.norm_out else nn.Identity()
        self.project = nn.Linear(dim, dim, bias=False) if config.final_projection else nn.Identity()

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        """x (b, dim), c_noise (b,), and a conditioning with text_embed (and text) -> (b, dim).

        Rows that are false in `text_keep` lose their caption; in `image_embed_keep`, the noisy embedding itself.

        Raises:
            ValueError: a condition is missing or of another width, or a caption has more than max_text_tokens tokens.
        """
        parts = [self._text_embed(conditioning), self._time(x, c_noise)]
        if self.null_text_tokens is not None and self.config.text_width is None:
            parts.insert(0, self.null_text_tokens.to(x.dtype).expand(len(x), -1, -1))
        elif self.null_text_tokens is not None and self.config.text_width is not None:
            if self.text_layers is not None:
                conditioning = self.text_layers(conditioning)
            project = nn.Identity() if self.to_text_tokens is None else self.to_text_tokens
            parts.insert(0, pad_with_learned(conditioning, self.config.text_width, project, self.null_text_tokens)[0])
        keep = keep_mask(conditioning.image_embed_keep, x)
        image = self.to_image(x).unflatten(-1, (-1, self.config.dim))
        parts.append(torch.where(keep[:, None, None], image, self.null_image.to(x.dtype)))
        if self.config.self_conditioning:
            estimate = torch.zeros_like(x) if conditioning.estimate is None else conditioning.estimate
            parts.append(estimate.to(x.dtype)[:, None])
        parts.append(self.query.to(x.dtype).expand(len(x), 1, -1))
        tokens = torch.cat(parts, dim=1)
        bias = self.bias(tokens.shape[1], null=self.config.null_position)
        for layer in self.layers:
            tokens = layer(tokens, bias=bias, rotary=self.rotary)
        last = tokens[:, -1]
        if self.config.norm_out and self.config.stable_norm_out:
            last = last / last.amax(dim=-1, keepdim=True).detach()
        return self.project(self.norm_out(last))

    def _text_embed(self, conditioning: Conditioning) -> Tensor:
        """(b, num_text_embed_tokens, dim)."""
        embed = conditioning.text_embed
        if embed is None:
            raise ValueError("conditioning.text_embed: a prior reads the captions' embeddings; give text_embed")
        if embed.shape[-1] != self.config.dim:
            raise ValueError(
                f"conditioning.text_embed: this model reads {self.config.dim}-wide embeddings (got {embed.shape[-1]})"
            )
        if self.config.unit_text_embed:
            embed = embed * self.config.dim**-0.5
        tokens = self.to_text_embed(embed.to(self.query.dtype)).unflatten(-1, (-1, self.config.dim))
        return torch.where(keep_mask(conditioning.text_keep, embed)[:, None, None], tokens, self.null_text_embed)

    def _time(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """(b, num_time_tokens, dim)."""
        if self.steps is not None:
            last = self.steps.num_embeddings - 1
            embedded = self.steps(c_noise.round().long().clamp(0, last))
        else:
            assert self.sinusoids is not None
            embedded = self.to_time(self.sinusoids(c_noise).to(x.dtype))
        return embedded.to(x.dtype).unflatten(-1, (-1, self.config.dim))


def _to_tokens(dim: int, count: int) -> nn.Module:
    return nn.Linear(dim, count * dim) if count > 1 else nn.Identity()
