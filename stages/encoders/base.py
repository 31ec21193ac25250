"""What a text encoder is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

FloatArray = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Embeddings of some captions, in their order."""

    embeddings: list[FloatArray]
    """float32 (num_tokens, dim) each; num_tokens counts the end-of-sequence token and differs by caption."""
    num_truncated: int
    """Captions longer than max_tokens; they were cut and keep their end-of-sequence token."""


class TextEncoder(Protocol):
    """A loaded model, ready to encode."""

    dim: int

    def encode(self, captions: Sequence[str]) -> Encoded:
        """Encodes captions. The result does not depend on which captions come together, beyond rounding."""
        ...


@dataclass(frozen=True, slots=True)
class EncoderIdentity:
    """What is known of an encoder without loading it."""

    dim: int
    fingerprint: dict[str, object]
    """Everything that decides the embeddings: model, revision, weights and tokenizer hashes, length, dtype."""
