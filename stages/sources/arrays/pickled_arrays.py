"""What stands for the classes and functions that pickles of numpy arrays and torch tensors name; numbers only."""

import math
from typing import Any, BinaryIO

import numpy as np

_NUMBERS = "fiub"

TORCH_DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}


class NotPlain(Exception):
    """What a pickle has that is not plain data."""


class Dtype:
    """A numpy dtype; BUILD sets its byte order."""

    def __init__(self, code: str, *_: object):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in _NUMBERS or self.dtype.fields:
            raise NotPlain(f"an array of {self.dtype}")

    def build(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A numpy array; BUILD fills it."""

    def __init__(self, *_: object):
        self.values = np.empty(0)

    def build(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.values = from_bytes(data, dtype, shape, "F" if is_fortran else "C")


class Storage:
    """The numbers of a torch storage; they follow the pickle that names it."""

    def __init__(self, dtype: str, size: int):
        self.dtype = dtype
        self.size = size
        self.values = np.empty(0)

    def fill(self, file: BinaryIO) -> None:
        (count,) = np.frombuffer(file.read(8), "<i8")
        is_bfloat16 = self.dtype == "bfloat16"
        stored = np.dtype("<u2" if is_bfloat16 else self.dtype)
        data = file.read(self.size * stored.itemsize)
        if count != self.size or len(data) != self.size * stored.itemsize:
            raise ValueError("a torch storage is cut off")
        values = np.frombuffer(data, stored)
        self.values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32) if is_bfloat16 else values


def from_bytes(data: Any, dtype: Any, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
    if isinstance(data, str):  # written by Python 2
        data = data.encode("latin-1")
    if not isinstance(dtype, Dtype) or not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise ValueError("an array without numbers")
    if not isinstance(shape, tuple):
        shape = (shape,)
    return np.frombuffer(bytes(data), dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def scalar(dtype: Dtype, data: Any) -> object:
    return from_bytes(data, dtype, (1,))[0].item()


def no_bytes() -> bytes:
    """How protocols below 3 write no bytes."""
    return b""


def encode(text: str, encoding: str) -> bytes:
    """How protocols below 3 write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"encoding {encoding!r}")
    return text.encode("latin-1")


def tensor(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object) -> np.ndarray:
    """A strided view of a storage, as a copy; all of it must lie inside."""
    if not isinstance(storage, Storage) or len(shape) != len(stride) or min((offset, *shape, *stride)) < 0:
        raise ValueError("a tensor without a plain storage")
    if math.prod(shape) > len(storage.values):
        raise ValueError("a tensor larger than its storage")
    if not math.prod(shape):
        return np.empty(shape, storage.values.dtype)
    places = np.array(offset)
    for size, step in zip(shape, stride, strict=True):
        places = places[..., None] + np.arange(size) * step
    return storage.values[places]
