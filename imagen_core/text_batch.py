"""Embeddings of prompts, of different lengths, as one tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def token_shape(encoder: Mapping[str, Any]) -> tuple[int, ...]:
    """What a token is of the embeddings that an encoder's record describes: (dim,), or (layers, dim)."""
    layers = encoder.get("layers")
    return (int(encoder["dim"]),) if layers is None else (len(layers), int(encoder["dim"]))


def pad_text(
    text: Sequence[np.ndarray | Tensor] | None, batch: int, text_shape: tuple[int, ...] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Ragged (num_tokens, *text_shape) arrays as one zero-padded (b, l, *text_shape) float32 tensor, and its bool
    (b, l) mask.

    Args:
        text_shape: (dim,), or (layers, dim); None means that no text is read.
    Raises:
        ValueError: another number of texts than images, or another shape than the stages read.
    """
    if text_shape is None:
        return None, None
    if text is None:
        text = [np.zeros((0, *text_shape), np.float32)] * batch
    if len(text) != batch:
        raise ValueError(f"text: {len(text)} captions for {batch} images; give one per image")
    rows = [torch.as_tensor(np.asarray(t, dtype=np.float32)) for t in text]
    wrong = [tuple(row.shape) for row in rows if not row.ndim or row.shape[1:] != text_shape]
    if wrong:
        wanted = ", ".join(map(str, ("num_tokens", *text_shape)))
        raise ValueError(f"text: the stages read ({wanted}) embeddings (got {wrong[0]})")
    longest = max(1, max(len(row) for row in rows))
    padded = torch.zeros(batch, longest, *text_shape)  # (b, l, x) or (b, l, layers, x)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    lengths = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(longest) < lengths[:, None]


def null_text_tensor(null_text: np.ndarray | Tensor, text_shape: tuple[int, ...] | None) -> Tensor:
    """The caption that takes the place of dropped ones as a float32 tensor (num_tokens, *text_shape).

    Raises:
        ValueError: no text is read, or of another shape.
    """
    if text_shape is None:
        raise ValueError("null_text: the stages read no captions as tokens; leave it out")
    values = torch.as_tensor(np.asarray(null_text, dtype=np.float32))
    if not values.ndim or values.shape[1:] != text_shape:
        wanted = ", ".join(map(str, ("num_tokens", *text_shape)))
        raise ValueError(f"null_text: the stages read ({wanted}) embeddings (got {tuple(values.shape)})")
    return values
