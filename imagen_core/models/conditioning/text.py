"""How captions reach the UNet: a context of tokens for attention, and one vector added to the time vector."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning, keep_mask
from imagen_core.models.conditioning.multihead_pooling import MultiheadPooling

Pooling = Literal["attention", "mean", "multihead"]
DroppedCaption = Literal["zero_tokens", "no_tokens", "empty_caption"]


class AttentionPooling(nn.Module):
    """Mean of the tokens, weighted by a softmax over one learned score per token."""

    def __init__(self, text_dim: int):
        super().__init__()
        self.score = nn.Linear(text_dim, 1)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """(b, l, text_dim), bool (b, l) -> (b, text_dim); zero where no token is real."""
        scores = self.score(text).squeeze(-1)
        # The lowest finite score, not minus infinity: a row without tokens has finite gradients.
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(~mask, 0)
        return torch.einsum("bl,blx->bx", weights.to(text.dtype), text)


class MeanPooling(nn.Module):
    """Plain mean of the real tokens."""

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """(b, l, text_dim), bool (b, l) -> (b, text_dim); zero where no token is real."""
        counts = mask.sum(dim=-1, keepdim=True).clamp(min=1)
        return (text * mask[..., None]).sum(dim=1) / counts


def _pooling_layer(kind: Pooling, text_dim: int, time_dim: int, num_heads: int) -> nn.Module:
    """(b, l, text_dim), bool (b, l) -> (b, text_dim), or of kind multihead (b, time_dim)."""
    if kind == "multihead":
        return MultiheadPooling(text_dim, time_dim, num_heads)
    return AttentionPooling(text_dim) if kind == "attention" else MeanPooling()


class TextConditioning(nn.Module):
    """Embeddings -> context (b, l, cond_dim) for attention, and a vector (b, time_dim).

    A row whose caption is dropped has zero embeddings, so that only the caption's length remains visible; with
    `no_tokens` not even its length.
    """

    def __init__(
        self,
        text_dim: int,
        cond_dim: int,
        time_dim: int,
        *,
        pooling: Pooling = "attention",
        pooling_heads: int = 64,
        null_token: bool = False,
        dropped_caption: DroppedCaption = "zero_tokens",
        padded_tokens: int | None = None,
        attended: bool = True,
    ):
        """
        Args:
            dropped_caption: what a row attends to when its caption is dropped: a zero embedding for each of its
                tokens (NeMo Imagen); nothing; or the encoding of "", which takes the caption's place as
                `Conditioning.null_text` (DeepFloyd IF).
            null_token: adds one learned token to every context, never masked.
            padded_tokens: captions are padded with zeros to this number of tokens; the padding is masked in the
                context but not in the pooling, and mean pooling averages the context (NeMo Imagen).
            attended: False for a model without text attention, which gets no context.
        """
        super().__init__()
        self.text_dim = text_dim
        self.dropped_caption: DroppedCaption = dropped_caption
        self.padded_tokens, self.attended = padded_tokens, attended
        averages_context = padded_tokens is not None and pooling == "mean"
        self.pool = _pooling_layer(pooling, text_dim, time_dim, pooling_heads)
        self.pooled = self.to_time = None
        if pooling != "multihead" and not averages_context:
            self.pooled = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, cond_dim))
        self.to_context = nn.Linear(text_dim, cond_dim) if attended or averages_context else None
        if pooling != "multihead":
            self.to_time = nn.Sequential(
                nn.LayerNorm(cond_dim), nn.Linear(cond_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
            )
        self.null_token = nn.Parameter(torch.zeros(cond_dim)) if null_token and attended else None

    def forward(self, conditioning: Conditioning) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Returns the context (b, l, cond_dim), its bool mask (b, l), and the vector (b, time_dim).

        Raises:
            ValueError: the text is missing, of another width, or longer than padded_tokens; or a caption is dropped
                without a null_text that the model needs.
        """
        text, mask = attended_text(conditioning, self.text_dim, self.dropped_caption)
        text, pooled_mask = text.to(next(self.parameters()).dtype), mask
        if self.padded_tokens is not None:
            text, mask = _padded(text, mask, self.padded_tokens)
            pooled_mask = torch.ones_like(mask)
        context = None if self.to_context is None else self.to_context(text)
        if self.to_time is None:
            vector = self.pool(text, pooled_mask)
        elif self.pooled is not None:
            vector = self.to_time(self.pooled(self.pool(text, pooled_mask)))
        else:
            vector = self.to_time(self.pool(context, pooled_mask))
        if context is None or not self.attended:
            return None, None, vector
        if self.null_token is not None:
            null = self.null_token.to(context.dtype).expand(context.shape[0], 1, -1)
            context, mask = torch.cat([null, context], dim=1), F.pad(mask, (1, 0), value=True)
        return context, mask, vector


def _padded(text: Tensor, mask: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Pads (b, l, text_dim) and (b, l) with zeros to `num_tokens`; ValueError if l is larger."""
    missing = num_tokens - text.shape[1]
    if missing < 0:
        raise ValueError(
            f"conditioning.text: {text.shape[1]} tokens, this model reads at most {num_tokens}; lower max_tokens"
        )
    return F.pad(text, (0, 0, 0, missing)), F.pad(mask, (0, missing), value=False)


def attended_text(conditioning: Conditioning, text_dim: int, dropped_caption: DroppedCaption) -> tuple[Tensor, Tensor]:
    """The embeddings (b, l, text_dim), zero in padding and in rows whose caption is dropped, and the mask (b, l) of
    the tokens to attend to.

    Raises:
        ValueError: the text is missing or of another width, or a caption is dropped without a null_text that the
            model needs.
    """
    text, mask = masked_text(conditioning, text_dim)
    if dropped_caption == "empty_caption" and conditioning.text_keep is not None:
        raise ValueError("conditioning.text_keep: this model reads the empty caption instead; give null_text")
    if dropped_caption == "no_tokens" and conditioning.text_keep is not None:
        mask = mask & conditioning.text_keep[:, None]
    return text, mask


def masked_text(conditioning: Conditioning, text_dim: int) -> tuple[Tensor, Tensor]:
    """The embeddings (b, l, text_dim), zero in padding and in rows whose caption is dropped, and the mask (b, l).

    Raises:
        ValueError: the text is missing or of another width.
    """
    text, mask, keep = checked_text(conditioning, text_dim)
    return text.masked_fill(~(mask & keep[:, None])[..., None], 0), mask


def checked_text(conditioning: Conditioning, text_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings (b, l, text_dim), their bool mask (b, l), and which rows keep their caption, bool (b,).

    Raises:
        ValueError: the text is missing or of another width.
    """
    text, mask = conditioning.text, conditioning.text_mask
    if text is None:
        raise ValueError("conditioning.text: this model reads captions; give text (for none, text_keep=False)")
    if isinstance(text, tuple) or isinstance(mask, tuple):
        raise ValueError("conditioning.text: this model reads one text encoder (got several); give one tensor")
    if text.ndim != 3:
        raise ValueError(
            f"conditioning.text: this model reads no layers (got {tuple(text.shape)}); set num_text_layers"
        )
    if text.shape[-1] != text_dim:
        raise ValueError(f"conditioning.text: this model reads {text_dim}-wide embeddings (got {text.shape[-1]})")
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    return text, mask, keep_mask(conditioning.text_keep, text)


def pad_with_learned(
    conditioning: Conditioning, text_dim: int, project: nn.Module, null: Tensor
) -> tuple[Tensor, Tensor]:
    """A caption as a fixed number of tokens: its own, projected, then learned ones; a dropped one has only these.

    So the result does not depend on the lengths of the other captions of a batch.

    Args:
        project: (b, l, text_dim) -> (b, l, dim).
        null: (max_tokens, dim), the learned tokens.
    Returns:
        (b, max_tokens, dim), and which rows keep their caption, bool (b,).
    Raises:
        ValueError: the text is missing, of another width, or longer than max_tokens.
    """
    text, mask, keep = checked_text(conditioning, text_dim)
    missing = len(null) - text.shape[1]
    if missing < 0:
        raise ValueError(
            f"conditioning.text: {text.shape[1]} tokens, this model reads at most {len(null)}; lower max_tokens"
        )
    tokens = project(text.to(null.dtype))
    real = F.pad(mask & keep[:, None], (0, missing))[..., None]
    return torch.where(real, F.pad(tokens, (0, 0, 0, missing)), null.to(tokens.dtype)), keep
