"""How the Hybrid UNets read captions, noise levels and low-resolution noise levels.

All conditions become tokens that the blocks attend to: two tokens of the noise level, two more of the low-resolution
image's noise level, and the caption, either as it is or as 36 tokens of a perceiver resampler
(Jaegle et al. 2021, arXiv 2103.03206; Alayrac et al. 2022, arXiv 2204.14198, section 3.1.1). A learned
embedding replaces a dropped caption.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.conditioning.image_embed import ImageEmbedConditioning, LabelEmbedding
from imagen_core.models.conditioning.text import pad_with_learned
from imagen_core.models.conditioning.text_embed import TextEmbedConditioning
from imagen_core.models.hybrid.config import HybridUNetSettings
from imagen_core.models.layers.attention import Attention
from imagen_core.models.layers.context import Context
from imagen_core.models.layers.noise_embedding import level_embedding
from imagen_core.models.layers.transformer import feed_forward
from imagen_core.models.unet.inputs import low_res_noise

_TOKENS_PER_LEVEL = 2


class LevelTokens(nn.Module):
    """A noise level as a vector (b, time_dim) and as tokens (b, 2, context_dim)."""

    def __init__(self, config: HybridUNetSettings):
        super().__init__()
        time_dim, context_dim = config.time_dim, config.context_dim
        embedding = level_embedding(config.dim, config.num_fourier_frequencies, closed=config.sinusoids == "closed")
        self.embedding = embedding
        activation = nn.GELU() if config.level_activation == "gelu" else nn.SiLU()
        self.hidden = nn.Sequential(nn.Linear(embedding.out_dim, time_dim), activation)
        self.to_vector = nn.Linear(time_dim, time_dim)
        self.to_tokens = nn.Linear(time_dim, _TOKENS_PER_LEVEL * context_dim)

    def forward(self, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        """float (b,) -> the vector and the tokens."""
        hidden = self.hidden(self.embedding(c_noise).to(self.to_vector.weight.dtype))
        return self.to_vector(hidden), self.to_tokens(hidden).unflatten(-1, (_TOKENS_PER_LEVEL, -1))


class HybridInputs(nn.Module):
    """Noise level, caption, image embedding, class and low-resolution noise level -> `Context`.

    All tokens are real (no mask).
    """

    def __init__(self, config: HybridUNetSettings):
        super().__init__()
        time_dim, context_dim = config.time_dim, config.context_dim
        self.level = LevelTokens(config)
        self.low_res_level = None
        if config.low_res_noise:
            self.low_res_level = LevelTokens(config)
        self.image_embed = None
        if config.image_embed_dim is not None:
            self.image_embed = ImageEmbedConditioning(
                config.image_embed_dim, context_dim, time_dim, config.num_image_tokens
            )
        self.text_embed = None
        if config.text_embed_dim is not None:
            self.text_embed = TextEmbedConditioning(config.text_embed_dim, time_dim)
        self.labels = None if config.num_classes is None else LabelEmbedding(config.num_classes, time_dim)
        self.text_layers = config.build_text_layers()
        self.text = None if config.text_width is None else CaptionTokens(config, config.text_width)
        self.unread = None
        if config.unread_caption_parameters:
            self.unread = EmptyCaption(config).requires_grad_(False)
        self.norm = nn.LayerNorm(context_dim)
        self.norm_middle = nn.LayerNorm(context_dim) if config.text_in_middle_only else None

    def forward(self, c_noise: Tensor, conditioning: Conditioning) -> tuple[Context, Context]:
        """c_noise float (b,) -> what the levels read, and what the middle reads.

        Raises:
            ValueError: a condition that the model reads is missing.
        """
        vectors, known, caption = conditioning.remembered(self, lambda: self._of_conditions(conditioning))
        vector, tokens = self.level(c_noise)
        for more in vectors:
            vector = vector + more
        all_tokens = tokens = torch.cat([tokens, *known], dim=1) if known else tokens
        if caption is not None:
            all_tokens = torch.cat([tokens, caption], dim=1)
        time = F.silu(vector)
        if self.norm_middle is None:
            context = Context(time, self.norm(all_tokens), None)
            return context, context
        return Context(time, self.norm(tokens), None), Context(time, self.norm_middle(all_tokens), None)

    def _of_conditions(self, conditioning: Conditioning) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """What does not depend on the noise level: vectors to add, tokens to follow its own, the caption's."""
        if self.text_layers is not None:
            conditioning = self.text_layers(conditioning)
        vectors: list[Tensor] = []
        tokens: list[Tensor] = []
        caption = None
        if self.low_res_level is not None:
            vector, level_tokens = self.low_res_level(low_res_noise(conditioning))
            vectors.append(vector)
            tokens.append(level_tokens)
        if self.labels is not None:
            vectors.append(self.labels(conditioning))
        if self.text_embed is not None:
            vectors.append(self.text_embed(conditioning))
        if self.image_embed is not None:
            image_tokens, vector = self.image_embed(conditioning)
            assert image_tokens is not None
            vectors.append(vector)
            tokens.append(image_tokens)
        if self.text is not None:
            caption, vector = self.text(conditioning)
            vectors.append(vector)
        return vectors, tokens, caption


class EmptyCaption(nn.Module):
    """Learned tokens and a learned vector in place of a dropped caption and of padding, and the perceiver."""

    def __init__(self, config: HybridUNetSettings):
        super().__init__()
        self.null_tokens = nn.Parameter(torch.randn(config.max_text_tokens, config.context_dim))
        self.null_vector = nn.Parameter(torch.randn(config.time_dim)) if config.caption_vector else None
        self.resampler = PerceiverResampler(config) if config.perceiver else None


class CaptionTokens(EmptyCaption):
    """A caption as tokens (b, t, context_dim) and as a vector (b, time_dim), zero without `caption_vector`.

    Captions are padded to max_text_tokens with learned embeddings, which also replace a dropped caption; so the result
    does not depend on the lengths of the other captions of a batch.
    """

    def __init__(self, config: HybridUNetSettings, text_dim: int):
        super().__init__(config)
        context_dim, time_dim = config.context_dim, config.time_dim
        self.text_dim = text_dim
        self.to_context = nn.Linear(text_dim, context_dim)
        self.to_vector = None
        if config.caption_vector:
            self.to_vector = nn.Sequential(
                nn.LayerNorm(context_dim), nn.Linear(context_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
            )

    def forward(self, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Returns the tokens and the vector.

        Raises:
            ValueError: the text is missing, of another width, or longer than max_text_tokens.
        """
        tokens, keep = pad_with_learned(conditioning, self.text_dim, self.to_context, self.null_tokens)
        if self.resampler is not None:
            tokens = self.resampler(tokens)
        if self.to_vector is None or self.null_vector is None:
            return tokens, tokens.new_zeros(())
        vector = self.to_vector(tokens.mean(dim=1))
        return tokens, torch.where(keep[:, None], vector, self.null_vector.to(vector.dtype))


class PerceiverResampler(nn.Module):
    """Any number of tokens -> by default 36: 32 learned queries and 4 projections of the tokens' mean, after attention
    layers."""

    def __init__(self, config: HybridUNetSettings, *, num_mean_latents: int = 4, depth: int = 2):
        super().__init__()
        dim = config.context_dim
        self.positions = nn.Parameter(torch.randn(512, dim))
        self.latents = nn.Parameter(torch.randn(config.perceiver_num_latents, dim))
        self.mean_norm = nn.LayerNorm(dim, bias=False)
        self.to_mean_latents = nn.Linear(dim, num_mean_latents * dim)
        self.layers = nn.ModuleList([ResamplerLayer(config) for _ in range(depth)])

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, dim), l <= 512 -> (b, perceiver_num_latents + 4, dim)."""
        placed = tokens + self.positions[: tokens.shape[1]].to(tokens.dtype)
        mean = self.to_mean_latents(self.mean_norm(tokens.mean(dim=1))).unflatten(-1, (-1, tokens.shape[-1]))
        latents = torch.cat([mean, self.latents.to(tokens.dtype).expand(tokens.shape[0], -1, -1)], dim=1)
        for layer in self.layers:
            latents = layer(placed, latents)
        return latents


class ResamplerLayer(nn.Module):
    """Latents attend to the tokens and to themselves, then a feed-forward layer; both with residuals."""

    def __init__(self, config: HybridUNetSettings):
        super().__init__()
        dim = config.context_dim
        self.norm_tokens, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(
            dim,
            kind="cross",
            num_heads=config.perceiver_num_heads,
            head_dim=config.perceiver_head_dim,
            context_dim=dim,
            bias=False,
            qk_norm=config.qk_norm,
        )
        self.norm_out = nn.LayerNorm(dim)
        self.feed_forward = feed_forward(dim, 4)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """tokens (b, l, dim), latents (b, m, dim) -> latents of the same shape."""
        queries = self.norm_latents(latents)
        context = torch.cat([self.norm_tokens(tokens), queries], dim=1)
        latents = latents + self.norm_out(self.attention(queries, context))
        return latents + self.feed_forward(latents)
