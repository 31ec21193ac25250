"""Embeddings of prompts, of different lengths, as one tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagen_core.models.conditioning.base import Tokens

EncoderRecords = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
"""What made the tokens that a model reads, as checkpoints record it: by one encoder, or several; None: no captions."""
_Embeddings = Sequence[np.ndarray | Tensor]
TextEmbeddings = _Embeddings | Mapping[str, _Embeddings]
"""An embedding per image; by encoder where there are several."""


def token_shape(encoder: Mapping[str, Any]) -> tuple[int, ...]:
    """What a token is of the embeddings that an encoder's record describes: (dim,), or (layers, dim)."""
    layers = encoder.get("layers")
    return (int(encoder["dim"]),) if layers is None else (len(layers), int(encoder["dim"]))


def each_encoder(recorded: EncoderRecords) -> list[Mapping[str, Any]]:
    """The records of the text encoders of a model: none, that of its one encoder, or of each of several."""
    if recorded is None:
        return []
    return [recorded] if isinstance(recorded, Mapping) else list(recorded)


def pad_texts(
    text: TextEmbeddings | None, batch: int, encoders: EncoderRecords
) -> tuple[Tokens | None, Tokens | None]:
    """Token embeddings of captions, and their mask, as `Conditioning` has them; see `pad_text`.

    Args:
        text: (num_tokens, *text_shape) arrays, one per image; where `encoders` are several, such arrays of each by its
            name. None means no captions.
        encoders: records of the encoders that are read.
    Raises:
        ValueError: another number of texts than images, another shape than the encoders', or one of them is missing.
    """
    if isinstance(encoders, Mapping) or encoders is None:
        if isinstance(text, Mapping):
            raise ValueError(f"text: is of the encoders {', '.join(text)}, but one is read; give a list")
        return pad_text(text, batch, None if encoders is None else token_shape(encoders))
    names = [encoder["name"] for encoder in encoders]
    if text is not None and (not isinstance(text, Mapping) or text.keys() != set(names)):
        found = ", ".join(text) if isinstance(text, Mapping) else "a list"
        raise ValueError(f"text: give the embeddings by encoder, of {', '.join(names)} (got {found})")
    of_each = [None if text is None else text[name] for name in names]
    padded = [pad_text(of, batch, token_shape(encoder)) for of, encoder in zip(of_each, encoders, strict=True)]
    tokens, masks = ([part for part in parts if part is not None] for parts in zip(*padded, strict=True))
    return tuple(tokens), tuple(masks)


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


def null_text_tensor(null_text: np.ndarray | Tensor, encoders: EncoderRecords) -> Tensor:
    """The caption that takes the place of dropped ones as a float32 tensor (num_tokens, *text_shape).

    Raises:
        ValueError: no text is read, or of several encoders, or of another shape.
    """
    read = each_encoder(encoders)
    if len(read) != 1:
        count = f"captions by {len(read)} encoders" if read else "no captions as tokens"
        raise ValueError(f"null_text: the stages read {count}; leave it out")
    text_shape = token_shape(read[0])
    values = torch.as_tensor(np.asarray(null_text, dtype=np.float32))
    if not values.ndim or values.shape[1:] != text_shape:
        wanted = ", ".join(map(str, ("num_tokens", *text_shape)))
        raise ValueError(f"null_text: the stages read ({wanted}) embeddings (got {tuple(values.shape)})")
    return values
