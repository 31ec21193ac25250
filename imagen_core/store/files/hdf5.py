"""HDF5 files of a store: contiguous datasets, byte-identical for the same rows.

A contiguous dataset is one run of bytes in the file, so a local reader asks h5py only for its start and maps it into
memory.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from typing import Any, BinaryIO

import h5py
import numpy as np

from imagen_core.store.errors import ADVICE, StoreError, reading, unreadable
from imagen_core.store.files.digest import DIGEST_DTYPE
from imagen_core.store.files.layers import check_held, stored_row
from imagen_core.store.files.ragged import DISK_DTYPES, SCALE_DTYPE, StoredEmbedding
from imagen_core.store.layout import StoreDtype, layer_suffixes
from imagen_core.store.records import EmbeddingGroup

BLOCK_BYTES = 4 << 20
HDF5_ERRORS = (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError)  # of h5py


@contextmanager
def new_hdf5(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """A new file, open for writing.

    Raises:
        OSError: writing failed, for example because the disk is full.
    """
    with open(path, "w+b", buffering=0) as raw:
        sink = _Sink(raw)
        # A small metadata block: the default pads each file to 2 KiB.
        with h5py.File(sink, "w", libver="latest", meta_block_size=512) as file:
            yield file
        if sink.error is not None:
            raise sink.error


class _Sink:
    """Reports every write to HDF5 as successful and keeps the first error, as HDF5 may crash after a failed write."""

    def __init__(self, file: FileIO) -> None:
        self.error: OSError | None = None
        self._file = file
        self.read, self.readinto, self.seek, self.tell = file.read, file.readinto, file.seek, file.tell
        self.flush = file.flush

    def write(self, data: bytes) -> int:
        left = memoryview(data).cast("B")
        self._attempt(lambda: self._write_all(left))
        return len(left)

    def _write_all(self, left: memoryview) -> None:
        while left:
            left = left[self._file.write(left) :]

    def truncate(self, size: int) -> None:
        self._attempt(lambda: self._file.truncate(size))

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            action()
        except OSError as error:
            self.error = error


def new_dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> h5py.Dataset:
    return file.create_dataset(name, shape=shape, dtype=dtype, track_times=False)


def fill(dataset: h5py.Dataset, spool: BinaryIO) -> None:
    """Copies all values from a file, in which they follow each other as bytes, with a bounded amount of memory."""
    spool.seek(0)
    row_bytes, start = dataset.dtype.itemsize * math.prod(dataset.shape[1:]), 0
    while block := spool.read(max(1, BLOCK_BYTES // row_bytes) * row_bytes):
        items = np.frombuffer(block, dataset.dtype).reshape(-1, *dataset.shape[1:])
        dataset[start : start + len(items)] = items
        start += len(items)


def new_ragged(
    file: h5py.File, name: str, lengths: Sequence[int], row_shape: tuple[int, ...], dtype: np.dtype
) -> tuple[h5py.Dataset, Callable[[], None]]:
    """New datasets for rows of different lengths: `name` (total, *row_shape) and "offsets" int64 (n + 1,).

    Returns the first dataset, and a function that writes the offsets. All datasets are made before any data is
    written, which keeps the metadata together.
    """
    offsets = np.zeros(len(lengths) + 1, dtype="<i8")
    np.cumsum(lengths, out=offsets[1:])
    values = new_dataset(file, name, (int(offsets[-1]), *row_shape), dtype)
    offsets_set = new_dataset(file, "offsets", offsets.shape, offsets.dtype)
    return values, lambda: offsets_set.write_direct(offsets)


def write_embeddings_hdf5(
    path: str | os.PathLike[str],
    embeddings: Iterable[tuple[StoredEmbedding, int]],
    num_tokens: Sequence[int],
    dim: int,
    dtype: StoreDtype,
    fingerprint: str,
    layers: Sequence[int] = (),
    num_scales: int = 1,
) -> None:
    """Write a shard's embeddings with their digests.

    Datasets: `tokens` (total, dim), `offsets` int64 (n + 1,), `digests` uint64 (n,) and, for int8, `scales`; of layers
    `tokens_N` and `scales_N` of each. bfloat16 tokens are uint16 bit patterns; the file's attribute "dtype" says so.
    """
    suffixes = layer_suffixes(layers)
    with new_hdf5(path) as file:
        file.attrs["dtype"] = np.bytes_(dtype)
        file.attrs["dim"] = np.int32(dim)
        file.attrs["fingerprint"] = np.bytes_(fingerprint)
        if layers:
            file.attrs["layers"] = np.array(layers, "<i4")
        if num_scales > 1:
            file.attrs["num_scales"] = np.int32(num_scales)
        first, write_offsets = new_ragged(file, f"tokens{suffixes[0]}", num_tokens, (dim,), DISK_DTYPES[dtype])
        more = [new_dataset(file, f"tokens{suffix}", first.shape, first.dtype) for suffix in suffixes[1:]]
        digests_set = new_dataset(file, "digests", (len(num_tokens),), DIGEST_DTYPE)
        scales: list[h5py.Dataset] = []
        if dtype == "int8":
            shape = (len(first),) if num_scales == 1 else (len(first), num_scales)
            scales = [new_dataset(file, f"scales{suffix}", shape, SCALE_DTYPE) for suffix in suffixes]
        digests: list[int] = []
        for start, block in _blocks(_without_digests(embeddings, digests)):
            for layer, parts in enumerate(zip(*(stored.parts() for stored in block), strict=True)):
                joined = _join(parts)
                stop = start + len(joined.values)
                [first, *more][layer][start:stop] = joined.values
                if scales:
                    scales[layer][start:stop] = joined.scales
        write_offsets()
        digests_set[...] = np.array(digests, DIGEST_DTYPE)


def _without_digests(
    embeddings: Iterable[tuple[StoredEmbedding, int]], digests: list[int]
) -> Iterator[StoredEmbedding]:
    """The embeddings; their digests are appended to a list."""
    for stored, digest in embeddings:
        digests.append(digest)
        yield stored


def _blocks(embeddings: Iterable[StoredEmbedding]) -> Iterator[tuple[int, list[StoredEmbedding]]]:
    """Embeddings in blocks of about 4 MiB, each with the index of its first token."""
    start = num_bytes = 0
    block: list[StoredEmbedding] = []
    for stored in embeddings:
        block.append(stored)
        num_bytes += stored.values.nbytes
        if num_bytes >= BLOCK_BYTES:
            yield start, block
            start += sum(len(stored.values) for stored in block)
            block, num_bytes = [], 0
    if num_bytes:
        yield start, block


def _join(block: Sequence[StoredEmbedding]) -> StoredEmbedding:
    if len(block) == 1:
        return block[0]
    scales = [stored.scales for stored in block if stored.scales is not None]
    values = np.concatenate([stored.values for stored in block])
    return StoredEmbedding(values, np.concatenate(scales) if scales else None)


class RaggedRows:
    """Rows of different lengths in an open file: row i is `values[offsets[i]:offsets[i + 1]]`."""

    def __init__(self, file: Any, dataset: Any, source: str | BinaryIO, name: str, *, close: bool = True) -> None:
        offsets: np.ndarray = file["offsets"][()]
        total = len(dataset)
        self.lengths: np.ndarray = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != total or (self.lengths < 0).any():
            raise StoreError(f"{name}: offsets do not rise from 0 to {total}; {ADVICE}")
        self.offsets: list[int] = offsets.tolist()
        self.values = map_dataset(dataset, source, close=close)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class Hdf5Embeddings:
    """Random access to the embeddings of a shard; see `EmbeddingFile`."""

    def __init__(self, source: str | BinaryIO, name: str, group: EmbeddingGroup) -> None:
        self._name, self._group, self._source = name, group, source
        with reading(name, "hdf5", HDF5_ERRORS):
            file = open_hdf5(source)
            found = (file.attrs["dtype"].decode(), int(file.attrs["dim"]))
            held = (tuple(map(int, file.attrs.get("layers", ()))), int(file.attrs.get("num_scales", 1)))
            self.fingerprint: str = file.attrs.get("fingerprint", b"").decode()
            check_held(name, group, found, held)
            self._parts = {suffix: self._open(file, suffix) for suffix in layer_suffixes(group.layers)}
            self.num_tokens: np.ndarray = next(iter(self._parts.values()))[0].lengths
            self._file = file  # keeps it open as long as a dataset of it is read
            read = [part for values, scales in self._parts.values() for part in (values.values, scales)]
            if all(part is None or isinstance(part, np.ndarray) for part in read):
                file.close()

    def _open(self, file: Any, suffix: str) -> tuple[RaggedRows, Any]:
        """The values and the scales of one layer; of layers no value is read."""
        group = self._group
        tokens = file[f"tokens{suffix}"]
        if tokens.dtype != DISK_DTYPES[group.dtype] or tokens.shape[1:] != (group.dim,):
            raise StoreError(
                f"{self._name}: holds {tokens.name} as {tokens.dtype} {tokens.shape}, not (dtype, dim) "
                f"{(group.dtype, group.dim)}; {ADVICE}"
            )
        scales = None
        if group.dtype == "int8":
            scales = file[f"scales{suffix}"]
            scales = map_dataset(scales, self._source, close=False) if group.layers else scales[()]
        return RaggedRows(file, tokens, self._source, self._name, close=False), scales

    @property
    def num_rows(self) -> int:
        """Number of embeddings."""
        return len(self.num_tokens)

    def stored(self, row: int, layers: Sequence[int] | None = None) -> StoredEmbedding:
        """The embedding of a row as stored; without layers possibly a read-only view of the file."""
        return stored_row(self._group, layers, lambda suffix: self._part(row, suffix))

    def _part(self, row: int, suffix: str) -> StoredEmbedding:
        try:
            values, scales = self._parts[suffix]
            tokens = slice(values.offsets[row], values.offsets[row + 1])
            return StoredEmbedding(values.values[tokens], None if scales is None else scales[tokens])
        except HDF5_ERRORS as error:
            raise unreadable(self._name, "hdf5", error) from error


def hdf5_digests(source: str | BinaryIO, name: str) -> np.ndarray | None:
    """The digest of each row, uint64; None in a file of schema 1."""
    with reading(name, "hdf5", HDF5_ERRORS), open_hdf5(source) as file:
        return file["digests"][()] if "digests" in file else None


def open_hdf5(source: str | BinaryIO) -> Any:
    return h5py.File(source, "r", locking=False)  # read-only network mounts may lack locks


def map_dataset(dataset: Any, source: str | BinaryIO, *, close: bool = True) -> Any:
    """The dataset as a memory map where possible, which closes h5py's file unless `close` is false."""
    offset = dataset.id.get_offset()  # None where it is chunked, or empty
    if not isinstance(source, str) or (offset is None and dataset.size):
        return dataset
    shape, dtype = dataset.shape, dataset.dtype
    if close:
        dataset.file.close()
    if offset is None:
        return np.zeros(shape, dtype)
    return np.memmap(source, dtype=dtype, mode="r", offset=offset, shape=shape).view(np.ndarray)
