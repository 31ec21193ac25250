"""What an array of a sample is: its dtype, and a shape whose axes are fixed or differ from sample to sample."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np

ArrayDtype = Literal[
    "bool", "uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"
]
MAX_ARRAY_BYTES = 1 << 30  # a row of a Parquet file is limited to 2 GiB
_MAX_AXES = 8


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """The dtype and the shape of one array per sample.

    Attributes:
        dtype: one of `ArrayDtype`.
        shape: the length of each axis; None for an axis whose length differs from sample to sample, and may be 0.
            () is a number.
    Raises:
        ValueError: another dtype, or a length below 1.
    """

    dtype: ArrayDtype
    shape: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in get_args(ArrayDtype):
            raise ValueError(f"dtype {self.dtype!r}: use one of {', '.join(get_args(ArrayDtype))}")
        if not isinstance(self.shape, tuple) or len(self.shape) > _MAX_AXES:
            raise ValueError(f"shape {self.shape!r}: give a tuple of at most {_MAX_AXES} lengths")
        if any(n is not None and (type(n) is not int or n < 1) for n in self.shape):
            raise ValueError(f"shape {self.shape}: an axis has a length of 1 or more, or None where it differs")
        if self.row_bytes is not None and self.row_bytes > MAX_ARRAY_BYTES:
            raise ValueError(f"shape {self.shape}: {self.row_bytes} bytes, more than {MAX_ARRAY_BYTES} per sample")

    @classmethod
    def of(cls, dtype: Any, shape: Any) -> Self:
        """From JSON, where a shape is a list; raises ValueError like the class."""
        if not isinstance(shape, list):
            raise ValueError(f"shape must be a list of lengths (got {shape!r})")
        return cls(dtype, tuple(shape))

    @property
    def disk_dtype(self) -> np.dtype:
        """The dtype of one element on disk, little-endian: bfloat16 as uint16 bits, bool as uint8 of 0 or 1."""
        if self.dtype == "bfloat16":
            return np.dtype("<u2")
        return np.dtype("u1") if self.dtype == "bool" else np.dtype(self.dtype).newbyteorder("<")

    @property
    def is_fixed(self) -> bool:
        """Whether all samples have the same shape."""
        return None not in self.shape

    @property
    def row_bytes(self) -> int | None:
        """Bytes of one array; None if they differ."""
        return math.prod(n for n in self.shape if n is not None) * self.disk_dtype.itemsize if self.is_fixed else None

    def blank(self) -> np.ndarray:
        """The stored array of a sample that has none: zeros, and nothing along axes whose length differs."""
        return np.zeros([n or 0 for n in self.shape], self.disk_dtype)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether an array may have this shape."""
        return len(shape) == len(self.shape) and all(
            n == m or (n is None and m >= 0) for n, m in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        lengths = ", ".join("any" if n is None else str(n) for n in self.shape)
        return f"{self.dtype} ({lengths}{',' if len(self.shape) == 1 else ''})"
