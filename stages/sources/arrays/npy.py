"""Reads .npy files row by row: numbers only, and never a pickle."""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.errors import ConfigError
from stages.sources.files import Damaged

_NUMBERS = "fiub"
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """The header of a .npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    """Bytes before the first number."""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO, where: str) -> NpyHeader:
    """Reads the header, and leaves the file at its end.

    Args:
        where: names the file in errors.

    Raises:
        Damaged: it has none.
        ConfigError: the array is not one of numbers in C order.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version not in _READERS:
            raise ValueError(f"format version {version}")
        shape, is_fortran, dtype = _READERS[version](file)
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}")
    except (ValueError, TypeError, SyntaxError, EOFError, RecursionError) as error:
        raise Damaged(f"not a .npy file: {error}") from error
    if dtype.kind not in _NUMBERS or dtype.itemsize > 8:
        raise ConfigError(
            f"{where}: holds {dtype} {shape}, and pickled objects or other types are never read; save plain "
            "numbers, as np.save(file, array.astype(np.float32)) does"
        )
    if is_fortran and len(shape) > 1 and min(shape) > 1:
        raise ConfigError(f"{where}: is in Fortran order; save np.ascontiguousarray(array)")
    return NpyHeader(shape, dtype, file.tell())


def parse(data: bytes, where: str) -> np.ndarray:
    """The array in the bytes of a .npy file; raises as `read_header`."""
    file = io.BytesIO(data)
    header = read_header(file, where)
    if len(data) != header.num_bytes:
        raise Damaged(f"{len(data)} bytes, its header says {header.num_bytes}")
    return np.frombuffer(data, header.dtype, offset=header.offset).reshape(header.shape)


def read_row(file: BinaryIO, header: NpyHeader, row: int) -> np.ndarray:
    """One row of an open file, of shape `header.shape[1:]`."""
    file.seek(header.offset + row * header.row_bytes)
    return np.frombuffer(file.read(header.row_bytes), header.dtype).reshape(header.shape[1:])


def map_file(path: Path) -> np.ndarray:
    """The array of a local file, mapped into memory for reading; raises as `read_header`."""
    with path.open("rb") as file:
        header = read_header(file, str(path))
    return np.memmap(path, header.dtype, mode="r", offset=header.offset, shape=header.shape)
