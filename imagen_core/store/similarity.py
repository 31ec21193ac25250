"""How far an embedding is from a reference, token by token."""

from dataclasses import dataclass

import numpy as np

_TINY = np.float32(1e-30)


@dataclass(frozen=True, slots=True)
class TokenErrors:
    """Float32 arrays (n_tokens,), one entry per token; of embeddings with layers one per token and layer.

    Attributes:
        cosine: of the angle to the reference, in [-1, 1].
        relative: length of the difference divided by the length of the reference.
        absolute: largest difference of one element.
    """

    cosine: np.ndarray
    relative: np.ndarray
    absolute: np.ndarray


def token_errors(x: np.ndarray, reference: np.ndarray) -> TokenErrors:
    """Compare two float (n_tokens, dim) or (n_tokens, layers, dim) embeddings; the cosine of a token of zeros is 1 to
    another one, else 0.

    Raises:
        ValueError: their shapes differ.
    """
    if x.shape != reference.shape:
        raise ValueError(f"embeddings {x.shape} and {reference.shape} cannot be compared")
    x, reference = (one.astype(np.float32, copy=False).reshape(-1, one.shape[-1]) for one in (x, reference))
    difference = x - reference
    distance, length, other = (np.sqrt(_dot(a, a)) for a in (difference, reference, x))
    cosine = np.clip(_dot(x, reference) / np.maximum(length * other, _TINY), -1.0, 1.0)
    return TokenErrors(
        cosine=np.where(distance == 0, np.float32(1.0), cosine),
        relative=distance / np.maximum(length, _TINY),
        absolute=np.abs(difference).max(axis=1, initial=0.0),
    )


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("td,td->t", a, b)
