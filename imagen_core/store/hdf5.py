"""HDF5 files of a store: contiguous datasets, byte-identical for the same rows.

A contiguous dataset is one run of bytes in the file, so a local reader asks h5py only where it starts
and maps it into memory.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from imagen_core.store.errors import ADVICE, StoreError, unreadable
from imagen_core.store.layout import StoreDtype
from imagen_core.store.ragged import DISK_DTYPES, SCALE_DTYPE, Stored

_BLOCK_BYTES = 4 << 20


def _new_hdf5(path: str | os.PathLike[str]) -> h5py.File:
    # A small metadata block: the default pads each file to 2 KiB.
    return h5py.File(path, "w", libver="latest", meta_block_size=512)


def _dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> h5py.Dataset:
    return file.create_dataset(name, shape=shape, dtype=dtype, track_times=False)


class Hdf5ImageWriter:
    """Takes checked pixels, spools them beside the file, and writes one dataset "pixels" at the end."""

    def __init__(self, path: Path, size_px: int) -> None:
        self._path, self._size_px, self._num_rows = path, size_px, 0
        self._spool_path = path.with_name(f"{path.name}.spool")
        self._spool = open(self._spool_path, "w+b")  # noqa: SIM115 - closed by finish and abort

    def append(self, pixels: np.ndarray) -> None:
        self._spool.write(pixels.tobytes())
        self._num_rows += 1

    def finish(self) -> None:
        shape = (self._size_px, self._size_px, 3)
        row_bytes = self._size_px * self._size_px * 3
        self._spool.seek(0)
        with _new_hdf5(self._path) as file:
            file.attrs["size_px"] = np.int32(self._size_px)
            pixels = _dataset(file, "pixels", (self._num_rows, *shape), np.dtype("u1"))
            start = 0
            while block := self._spool.read(max(1, _BLOCK_BYTES // row_bytes) * row_bytes):
                rows = np.frombuffer(block, dtype=np.uint8).reshape(-1, *shape)
                pixels[start : start + len(rows)] = rows
                start += len(rows)
        self.abort()

    def abort(self) -> None:
        self._spool.close()
        self._spool_path.unlink(missing_ok=True)


def write_text_hdf5(
    path: str | os.PathLike[str],
    embeddings: Iterable[Stored],
    num_tokens: Sequence[int],
    dim: int,
    dtype: StoreDtype,
) -> None:
    """Write a shard's embeddings: `tokens` (total, dim), `offsets` int64 (n + 1,) and, for int8, `scales`.

    bfloat16 tokens are uint16 bit patterns; the file's attribute "dtype" says so.
    """
    offsets = np.zeros(len(num_tokens) + 1, dtype="<i8")
    np.cumsum(num_tokens, out=offsets[1:])
    total = int(offsets[-1])
    with _new_hdf5(path) as file:
        file.attrs["dtype"] = np.bytes_(dtype)
        file.attrs["dim"] = np.int32(dim)
        # All datasets before any data: then the metadata stays together.
        tokens = _dataset(file, "tokens", (total, dim), DISK_DTYPES[dtype])
        offsets_set = _dataset(file, "offsets", offsets.shape, offsets.dtype)
        scales = _dataset(file, "scales", (total,), SCALE_DTYPE) if dtype == "int8" else None
        for start, block in _blocks(embeddings):
            stop = start + len(block.values)
            tokens[start:stop] = block.values
            if scales is not None:
                scales[start:stop] = block.scales
        offsets_set[...] = offsets


def _blocks(embeddings: Iterable[Stored]) -> Iterator[tuple[int, Stored]]:
    """Embeddings joined to blocks of about 4 MiB, each with its first token's number."""
    start = num_bytes = 0
    block: list[Stored] = []
    for stored in embeddings:
        block.append(stored)
        num_bytes += stored.values.nbytes
        if num_bytes >= _BLOCK_BYTES:
            joined = _join(block)
            yield start, joined
            start += len(joined.values)
            block, num_bytes = [], 0
    if num_bytes:
        yield start, _join(block)


def _join(block: list[Stored]) -> Stored:
    scales = [stored.scales for stored in block if stored.scales is not None]
    values = np.concatenate([stored.values for stored in block])
    return Stored(values, np.concatenate(scales) if scales else None)


class Hdf5Images:
    """Random access to a shard's pictures; `num_rows` of them."""

    def __init__(self, source: str | BinaryIO, name: str, size_px: int) -> None:
        self._name = name
        with _reading(name):
            file = _open_hdf5(source)
            dataset = file["pixels"]
            if dataset.shape[1:] != (size_px, size_px, 3) or dataset.dtype != np.uint8:
                raise StoreError(
                    f"{name}: pixels are {dataset.dtype} {dataset.shape}, not uint8 "
                    f"(n, {size_px}, {size_px}, 3); {ADVICE}"
                )
            self.num_rows: int = dataset.shape[0]
            self._pixels = _map(dataset, source)
            self._file = file  # open as long as a dataset of it is read

    def pixels(self, row: int) -> np.ndarray:
        """uint8 (S, S, 3); possibly a read-only view of the file."""
        with _reading(self._name):
            return self._pixels[row]


class Hdf5Text:
    """Random access to a shard's embeddings; `num_tokens` is an integer array with one entry a caption."""

    def __init__(self, source: str | BinaryIO, name: str, dim: int, dtype: StoreDtype) -> None:
        self._name = name
        with _reading(name):
            file = _open_hdf5(source)
            found = (file.attrs["dtype"].decode(), int(file.attrs["dim"]))
            tokens = file["tokens"]
            if found != (dtype, dim) or tokens.dtype != DISK_DTYPES[dtype] or tokens.shape[1:] != (dim,):
                raise StoreError(
                    f"{name}: holds (dtype, dim) {found} as {tokens.dtype} {tokens.shape}, not "
                    f"{(dtype, dim)}; {ADVICE}"
                )
            self._offsets: np.ndarray = file["offsets"][()]
            self._scales = file["scales"][()] if dtype == "int8" else None
            self.num_tokens: np.ndarray = np.diff(self._offsets)
            total = tokens.shape[0]
            if self._offsets[0] != 0 or self._offsets[-1] != total or (self.num_tokens < 0).any():
                raise StoreError(f"{name}: offsets do not rise from 0 to {total}; {ADVICE}")
            self._tokens = _map(tokens, source)
            self._file = file  # open as long as a dataset of it is read

    @property
    def num_rows(self) -> int:
        return len(self.num_tokens)

    def stored(self, row: int) -> Stored:
        """One caption's embedding; possibly a read-only view of the file."""
        tokens = slice(int(self._offsets[row]), int(self._offsets[row + 1]))
        with _reading(self._name):
            return Stored(self._tokens[tokens], None if self._scales is None else self._scales[tokens])


def _open_hdf5(source: str | BinaryIO) -> Any:
    return h5py.File(source, "r", locking=False)  # read-only network mounts may lack locks


def _map(dataset: Any, source: str | BinaryIO) -> Any:
    """The dataset as a memory map where it can be one; h5py's file is closed then."""
    offset = dataset.id.get_offset()  # None where it is chunked, or empty
    if not isinstance(source, str) or (offset is None and dataset.size):
        return dataset
    shape, dtype = dataset.shape, dataset.dtype
    dataset.file.close()
    if offset is None:
        return np.zeros(shape, dtype)
    return np.memmap(source, dtype=dtype, mode="r", offset=offset, shape=shape).view(np.ndarray)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what h5py raises about a bad file into a StoreError that names it."""
    try:
        yield
    except StoreError:
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise unreadable(name, "hdf5", error) from error
