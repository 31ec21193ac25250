"""Cast token embeddings to the store's dtype and back.

bfloat16 has no numpy type, so its bit patterns are kept as uint16. int8 is symmetric with one scale per token, or per
layer of a token: value = q * scale, scale = max|x| / 127.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imagen_core.store.layout import StoreDtype, check_dtype

# The type of one element on disk, little-endian.
DISK_DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
}
SCALE_DTYPE = np.dtype("<f4")

# Magnitudes from here on round to infinity (half way above the largest finite value, ties to even).
# An int8 row must fit float16 too, as the loader returns it as float16.
_OVERFLOW: dict[str, float] = {
    "float16": 65520.0,
    "bfloat16": (2.0 - 2.0**-8) * 2.0**127,
    "float32": float("inf"),
    "int8": 65520.0,
}


class NotFiniteError(ValueError):
    """An embedding that the store's dtype cannot hold."""


@dataclass(frozen=True, slots=True)
class StoredEmbedding:
    """One row's embedding as it is on disk.

    `values` is (n_tokens, dim) of float16, uint16 (bfloat16 bits), float32 or int8; `scales` is float32 (n_tokens,)
    for int8, or (n_tokens, num_scales) where each of so many equal parts of dim has its own, and None otherwise.
    With layers `values` is (n_tokens, layers, dim) and `scales` (n_tokens, layers); both lie in memory as they are on
    disk, layer after layer.
    """

    values: np.ndarray
    scales: np.ndarray | None = None

    def parts(self) -> "list[StoredEmbedding]":
        """What is stored apart: (n_tokens, dim) of each layer; of an embedding without layers itself."""
        if self.values.ndim == 2:
            return [self]
        scales = [None] * self.values.shape[1] if self.scales is None else self.scales.T
        return [StoredEmbedding(self.values[:, k], scales[k]) for k in range(self.values.shape[1])]

    def first(self, num_tokens: int | None) -> "StoredEmbedding":
        """The first tokens; None means all."""
        scales = None if self.scales is None else self.scales[:num_tokens]
        return StoredEmbedding(self.values[:num_tokens], scales)


def stacked(parts: Sequence[StoredEmbedding]) -> StoredEmbedding:
    """The layers of an embedding, (n_tokens, dim) each, as one with layers."""
    values = np.stack([part.values for part in parts]).transpose(1, 0, 2)
    scales = [part.scales for part in parts if part.scales is not None]
    return StoredEmbedding(values, np.stack(scales).T if scales else None)


def is_finite_as(x: np.ndarray, dtype: StoreDtype) -> bool:
    """Whether every element is finite, and still is after the cast to `dtype`.

    float16 overflows above 65504. int8 has float16's range, because the loader returns it as float16.
    """
    check_dtype(dtype)
    # NaN fails the comparison, so one pass over the array is enough.
    return x.size == 0 or bool(max(float(np.max(x)), -float(np.min(x))) < _OVERFLOW[dtype])


def cast_embedding(x: np.ndarray, dtype: StoreDtype, num_scales: int = 1) -> StoredEmbedding:
    """Cast a float (n_tokens, dim) embedding to its stored form, rounding to nearest even; or one with layers,
    (n_tokens, layers, dim), which are then stored apart.

    Args:
        num_scales: of int8 without layers: the number of equal parts of dim that have a scale each.
    Raises:
        ValueError: not of two or three dimensions, or not floating point.
        NotFiniteError: not finite after the cast.
    """
    if x.ndim not in (2, 3) or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"an embedding is a float array (n_tokens, dim) or (n_tokens, layers, dim); got {x.dtype} {x.shape}"
        )
    if not is_finite_as(x, dtype):
        raise NotFiniteError(f"embedding {x.shape} is not finite as {dtype}; drop it (see is_finite_as)")
    if x.ndim == 3:
        return _cast_layers(x, dtype)
    x = np.ascontiguousarray(x, dtype=np.float32)
    if dtype == "int8":
        return _quantise(x, num_scales)
    if dtype == "float32":
        return StoredEmbedding(x.astype(DISK_DTYPES[dtype]))
    import torch  # four times as fast as numpy here

    if not x.flags.writeable:
        x = x.copy()  # or torch warns
    half = torch.from_numpy(x).to(getattr(torch, dtype))
    return StoredEmbedding(half.view(torch.int16).numpy().view(DISK_DTYPES[dtype]))


def _cast_layers(x: np.ndarray, dtype: StoreDtype) -> StoredEmbedding:
    """(n_tokens, layers, dim), one layer at a time: memory holds the result once, and one layer besides."""
    num_tokens, num_layers, dim = x.shape
    values = np.empty((num_layers, num_tokens, dim), DISK_DTYPES[dtype])
    scales = np.empty((num_layers, num_tokens), SCALE_DTYPE) if dtype == "int8" else None
    for layer in range(num_layers):
        part = cast_embedding(x[:, layer], dtype)
        values[layer] = part.values
        if scales is not None:
            scales[layer] = part.scales
    return StoredEmbedding(values.transpose(1, 0, 2), None if scales is None else scales.T)


def _quantise(x: np.ndarray, num_scales: int) -> StoredEmbedding:
    parts = x.reshape(len(x), num_scales, x.shape[1] // num_scales)
    scales = (np.abs(parts).max(axis=2, initial=0.0) / np.float32(127.0)).astype(SCALE_DTYPE)
    divisors = np.where(scales > 0, scales, np.float32(1.0))
    values = np.clip(np.rint(parts / divisors[..., None]), -127, 127)
    return StoredEmbedding(values.astype(np.int8).reshape(x.shape), scales[:, 0] if num_scales == 1 else scales)


def restore(stored: StoredEmbedding, dtype: StoreDtype) -> np.ndarray:
    """The embedding as numpy floats of the same shape: float16 for a float16 store, float32 for all others."""
    values = stored.values
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "int8":
        assert stored.scales is not None
        scales = stored.scales.astype(np.float32)
        if scales.ndim == 2 and values.ndim == 2:  # of equal parts of dim
            scales = scales.repeat(values.shape[1] // scales.shape[1], axis=1)
        else:
            scales = scales[..., None]
        return values.astype(np.float32) * scales
    return np.array(values, dtype=np.float16 if dtype == "float16" else np.float32)


def all_finite(stored: StoredEmbedding, dtype: StoreDtype) -> bool:
    """Whether no stored value is NaN or infinite."""
    if dtype == "bfloat16":  # all exponent bits set
        return not bool(np.any((stored.values & np.uint16(0x7F80)) == 0x7F80))
    return bool(np.isfinite(stored.values if stored.scales is None else stored.scales).all())
