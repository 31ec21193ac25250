"""Text as character ids."""

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_IDS = 257
"""Padding, and the 256 values of a byte."""


def character_ids(texts: Sequence[str], limit: int, *, truncate: bool = False) -> Tensor:
    """The bytes of each text in UTF-8, plus 1: int64 (b, l), l at least 1; 0 is padding.

    No vocabulary is needed, and every language can be written; a letter without accents is one byte.

    Args:
        limit: maximum bytes of a text.
        truncate: truncate longer texts, after a complete character.
    Raises:
        ValueError: a text is longer and `truncate` is false.
    """
    rows = [text.encode() for text in texts]
    if truncate:
        rows = [row[:limit].decode(errors="ignore").encode() for row in rows]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > limit:
            raise ValueError(
                f"transcription {text!r}: {len(row)} bytes in UTF-8, but the model reads at most {limit} "
                "(unet.transcription.max_characters); shorten it"
            )
    ids = torch.zeros(len(rows), max([1, *map(len, rows)]), dtype=torch.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = torch.tensor(list(values), dtype=torch.int64) + 1
    return ids
