"""How the Hybrid UNets read captions, noise levels and low-resolution noise levels.

Everything that conditions becomes tokens that the blocks attend to: two tokens of the noise level, two more of the
low-resolution picture's noise level, and the caption, either as it is or as 36 tokens of a perceiver resampler
(Jaegle et al. 2021, arXiv 2103.03206; Alayrac et al. 2022, arXiv 2204.14198, section 3.1.1). A caption left out is a
learned embedding.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.attention import Attention
from imagen_core.models.conditioning import Conditioning
from imagen_core.models.embeddings import LearnedFourierEmbedding, SinusoidalEmbedding
from imagen_core.models.inputs import Context
from imagen_core.models.text import checked_text

_TOKENS_PER_LEVEL = 2


class HybridInputConfig(Protocol):
    """The fields of a Hybrid UNet's configuration read here."""

    @property
    def dim(self) -> int: ...
    @property
    def text_dim(self) -> int | None: ...
    @property
    def context_dim(self) -> int: ...
    @property
    def time_dim(self) -> int: ...
    @property
    def max_text_tokens(self) -> int: ...
    @property
    def perceiver(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def num_fourier_frequencies(self) -> int | None: ...
    @property
    def low_res_noise(self) -> bool: ...
    @property
    def unread_caption_parameters(self) -> bool: ...


class LevelTokens(nn.Module):
    """A noise level as a vector (b, time_dim) and as tokens (b, 2, context_dim)."""

    def __init__(self, dim: int, time_dim: int, context_dim: int, num_frequencies: int | None):
        super().__init__()
        embedding = SinusoidalEmbedding(dim) if num_frequencies is None else LearnedFourierEmbedding(num_frequencies)
        self.embedding = embedding
        self.hidden = nn.Sequential(nn.Linear(embedding.out_dim, time_dim), nn.SiLU())
        self.to_vector = nn.Linear(time_dim, time_dim)
        self.to_tokens = nn.Linear(time_dim, _TOKENS_PER_LEVEL * context_dim)

    def forward(self, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        """(b,) -> the vector and the tokens. The embedding is float32 or better, whatever the model's precision."""
        values = c_noise.to(torch.promote_types(c_noise.dtype, torch.float32))
        hidden = self.hidden(self.embedding(values).to(self.to_vector.weight.dtype))
        return self.to_vector(hidden), self.to_tokens(hidden).unflatten(-1, (_TOKENS_PER_LEVEL, -1))


class HybridInputs(nn.Module):
    """Noise level, caption and low-resolution noise level -> `Context`, whose tokens all are real (no mask)."""

    def __init__(self, config: HybridInputConfig):
        super().__init__()
        dim, time_dim, context_dim = config.dim, config.time_dim, config.context_dim
        frequencies = config.num_fourier_frequencies
        self.level = LevelTokens(dim, time_dim, context_dim, frequencies)
        self.low_res_level = LevelTokens(dim, time_dim, context_dim, frequencies) if config.low_res_noise else None
        self.text = None
        if config.text_dim is not None:
            self.text = CaptionTokens(
                config.text_dim,
                context_dim,
                time_dim,
                max_tokens=config.max_text_tokens,
                perceiver=config.perceiver,
                qk_norm=config.qk_norm,
            )
        self.unread = None
        if config.unread_caption_parameters:
            self.unread = nn.ParameterDict(
                {
                    "null_tokens": torch.randn(config.max_text_tokens, context_dim),
                    "null_vector": torch.randn(time_dim),
                }
            )
            self.unread_resampler = PerceiverResampler(context_dim, qk_norm=config.qk_norm).requires_grad_(False)
            self.unread.requires_grad_(False)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, c_noise: Tensor, conditioning: Conditioning) -> Context:
        """c_noise (b,).

        Raises:
            ValueError: a condition the model reads is missing.
        """
        vector, tokens = self.level(c_noise)
        if self.low_res_level is not None:
            if conditioning.low_res_noise is None:
                raise ValueError("conditioning.low_res_noise: this model reads the noise level of the low_res picture")
            more, level_tokens = self.low_res_level(conditioning.low_res_noise)
            vector, tokens = vector + more, torch.cat([tokens, level_tokens], dim=1)
        if self.text is not None:
            caption_tokens, more = self.text(conditioning)
            vector, tokens = vector + more, torch.cat([tokens, caption_tokens], dim=1)
        return Context(F.silu(vector), self.norm(tokens), None)


class CaptionTokens(nn.Module):
    """A caption as tokens (b, t, context_dim) and as a vector (b, time_dim).

    Captions are padded to max_tokens with a learned embedding, which also stands for a caption left out; so the
    result does not depend on the lengths of the other captions of a batch.
    """

    def __init__(
        self, text_dim: int, context_dim: int, time_dim: int, *, max_tokens: int, perceiver: bool, qk_norm: bool
    ):
        super().__init__()
        self.text_dim, self.max_tokens = text_dim, max_tokens
        self.to_context = nn.Linear(text_dim, context_dim)
        self.null_tokens = nn.Parameter(torch.randn(max_tokens, context_dim))
        self.null_vector = nn.Parameter(torch.randn(time_dim))
        self.resampler = PerceiverResampler(context_dim, qk_norm=qk_norm) if perceiver else None
        self.to_vector = nn.Sequential(
            nn.LayerNorm(context_dim), nn.Linear(context_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )

    def forward(self, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """
        Raises:
            ValueError: no text, text of another width, or longer than max_tokens.
        """
        text, mask, keep = checked_text(conditioning, self.text_dim)
        if text.shape[1] > self.max_tokens:
            raise ValueError(
                f"conditioning.text: {text.shape[1]} tokens, this model reads at most {self.max_tokens}; "
                "lower max_tokens"
            )
        missing = self.max_tokens - text.shape[1]
        real = F.pad(mask & keep[:, None], (0, missing))[..., None]
        tokens = F.pad(self.to_context(text.to(self.to_context.weight.dtype)), (0, 0, 0, missing))
        tokens = torch.where(real, tokens, self.null_tokens.to(tokens.dtype))
        if self.resampler is not None:
            tokens = self.resampler(tokens)
        vector = self.to_vector(tokens.mean(dim=1))
        return tokens, torch.where(keep[:, None], vector, self.null_vector.to(vector.dtype))


class PerceiverResampler(nn.Module):
    """Any number of tokens -> 32 learned queries and 4 tokens made of their mean, after two attention layers."""

    def __init__(self, dim: int, *, num_latents: int = 32, num_mean_latents: int = 4, depth: int = 2, qk_norm: bool):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(512, dim))
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.mean_norm = nn.LayerNorm(dim, bias=False)
        self.to_mean_latents = nn.Linear(dim, num_mean_latents * dim)
        self.layers = nn.ModuleList([ResamplerLayer(dim, qk_norm=qk_norm) for _ in range(depth)])

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, dim), l <= 512 -> (b, 36, dim)."""
        placed = tokens + self.positions[: tokens.shape[1]].to(tokens.dtype)
        mean = self.to_mean_latents(self.mean_norm(tokens.mean(dim=1))).unflatten(-1, (-1, tokens.shape[-1]))
        latents = torch.cat([mean, self.latents.to(tokens.dtype).expand(len(tokens), -1, -1)], dim=1)
        for layer in self.layers:
            latents = layer(placed, latents)
        return latents


class ResamplerLayer(nn.Module):
    """Latents attend to the tokens and to themselves, then a feed-forward layer; both with residuals."""

    def __init__(self, dim: int, *, qk_norm: bool):
        super().__init__()
        self.norm_tokens, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(
            dim, kind="cross", num_heads=8, head_dim=64, context_dim=dim, bias=False, qk_norm=qk_norm
        )
        self.norm_out = nn.LayerNorm(dim)
        self.feed_forward = feed_forward(dim, 4)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        queries = self.norm_latents(latents)
        context = torch.cat([self.norm_tokens(tokens), queries], dim=1)
        latents = latents + self.norm_out(self.attention(queries, context))
        return latents + self.feed_forward(latents)


def feed_forward(dim: int, multiplier: int) -> nn.Sequential:
    """Norm, linear, GELU, norm, linear, without biases, on the last axis."""
    inner = multiplier * dim
    return nn.Sequential(
        nn.LayerNorm(dim, bias=False),
        nn.Linear(dim, inner, bias=False),
        nn.GELU(),
        nn.LayerNorm(inner, bias=False),
        nn.Linear(inner, dim, bias=False),
    )
