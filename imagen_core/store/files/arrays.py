"""Write and open one shard's file of arrays, one per sample, in either format.

Parquet: column "value" (binary; of fixed size where all samples have one shape), "digest" and, where shapes differ,
"sizes" (int32 per axis). HDF5: dataset "values" (n, *shape), or (elements of all,) with "offsets" (n + 1,) and "sizes"
(n, axes); "digests" (n,). Both say "dtype", "shape" (JSON, null for an axis that differs) and "fingerprint".
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imagen_core.store.array_spec import MAX_ARRAY_BYTES, ArraySpec
from imagen_core.store.errors import ADVICE, StoreError, reading, unreadable
from imagen_core.store.files.digest import DIGEST_DTYPE, array_digest, fingerprint_digest
from imagen_core.store.files.hdf5 import (
    HDF5_ERRORS,
    RaggedRows,
    fill,
    map_dataset,
    new_dataset,
    new_hdf5,
    new_ragged,
    open_hdf5,
)
from imagen_core.store.files.parquet import DIGEST_FIELD, PARQUET_ERRORS, RowGroups, new_parquet
from imagen_core.store.files.parquet_column import BlobColumn
from imagen_core.store.files.ragged import NotFiniteError, cast_embedding, is_finite_as
from imagen_core.store.layout import ROW_GROUP_BYTES, StoreFormat, check_format
from imagen_core.store.records import ArrayGroup

_SIZE_DTYPE = np.dtype("<i4")


def cast_array(spec: ArraySpec, value: np.ndarray) -> np.ndarray:
    """The array as it is stored.

    Args:
        value: of the spec's dtype and shape; for bfloat16 float32, which is rounded to nearest even.
    Raises:
        ValueError: another dtype or shape, or more than 1 GiB.
        NotFiniteError: a value is NaN or infinite.
    """
    expected = np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)
    if value.dtype != expected or not spec.fits(value.shape):
        raise ValueError(f"{value.dtype} {value.shape} is not {spec}")
    if value.size * spec.disk_dtype.itemsize > MAX_ARRAY_BYTES:
        raise ValueError(f"{value.dtype} {value.shape} has more than {MAX_ARRAY_BYTES} bytes")
    if spec.dtype == "bfloat16":
        if not is_finite_as(value, "bfloat16"):
            raise NotFiniteError("a value is not finite as bfloat16")
        return cast_embedding(value.reshape(1, -1), "bfloat16").values.reshape(value.shape)
    if np.issubdtype(expected, np.floating) and not np.isfinite(value).all():
        raise NotFiniteError("a value is NaN or infinite")
    return np.ascontiguousarray(value, spec.disk_dtype).reshape(value.shape)


def restore_array(spec: ArraySpec, stored: np.ndarray) -> np.ndarray:
    """The array as readers get it, a copy: in its dtype, and bfloat16 as float32."""
    if spec.dtype == "bfloat16":
        return np.left_shift(stored, 16, dtype=np.uint32)[...].view(np.float32)
    return stored.astype(np.dtype(spec.dtype))


def array_problem(spec: ArraySpec, stored: np.ndarray) -> str | None:
    """What is wrong with the values of a stored array; None if nothing is."""
    if spec.dtype == "bool":
        return "holds values other than 0 and 1" if (stored > 1).any() else None
    values = restore_array(spec, stored)
    return "is not finite" if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all() else None


class ArrayWriter:
    """Appends arrays to one file; made by `open_array_writer`."""

    def __init__(self, path: Path, spec: ArraySpec, store_format: StoreFormat, fingerprint: str) -> None:
        self._spec, self._fingerprint = spec, fingerprint
        self._writer = (_ParquetWriter if store_format == "parquet" else _Hdf5Writer)(path, spec, fingerprint)
        self.num_rows = 0

    def append(self, value: np.ndarray, key: str) -> None:
        """Adds the array of the sample with this key as the next row.

        Raises:
            ValueError: another dtype or shape than that of the file, or not finite.
        """
        self.append_stored(cast_array(self._spec, value), key)

    def append_stored(self, stored: np.ndarray, key: str) -> None:
        """Adds an array as stored in another file of the same dtype and shape; see `ArrayFile.stored`."""
        self._writer.append(stored, array_digest(self._fingerprint, key, stored))
        self.num_rows += 1

    def finish(self) -> None:
        """Completes the file."""
        self._writer.finish()

    def abort(self) -> None:
        """Closes the file, which stays incomplete."""
        self._writer.abort()


@contextmanager
def open_array_writer(
    path: str | os.PathLike[str], spec: ArraySpec, store_format: StoreFormat, fingerprint: Mapping[str, Any]
) -> Iterator[ArrayWriter]:
    """Opens a file for a shard's arrays, of any number of rows; if the `with` block raises, the file is removed.

    Memory stays at one row group (512 KiB, or one array).

    Args:
        fingerprint: of what makes the arrays, as in the manifest.
    Raises:
        ValueError: an unknown format.
    """
    path = Path(path)
    writer = ArrayWriter(path, spec, check_format(store_format), fingerprint_digest(fingerprint))
    try:
        yield writer
        writer.finish()
    except BaseException:
        try:
            writer.abort()
        finally:
            path.unlink(missing_ok=True)
        raise


def array_shard_bytes(spec: ArraySpec, num_rows: int) -> int | None:
    """Bytes of a file of this many rows; within 1 % where rows have 1 KiB or more; None if the shapes differ."""
    if spec.row_bytes is None:
        return None
    payload = spec.row_bytes * num_rows
    return payload + DIGEST_DTYPE.itemsize * num_rows + 230 * -(-payload // ROW_GROUP_BYTES) + 650


class _ParquetWriter:
    def __init__(self, path: Path, spec: ArraySpec, fingerprint: str) -> None:
        self._is_fixed = spec.is_fixed
        value = pa.binary(spec.row_bytes) if spec.row_bytes is not None else pa.binary()
        fields = [pa.field("value", value, nullable=False), DIGEST_FIELD]
        if not spec.is_fixed:
            width = _SIZE_DTYPE.itemsize * len(spec.shape)
            fields.append(pa.field("sizes", pa.binary(width), nullable=False))
        schema = pa.schema(fields)
        metadata = {"dtype": spec.dtype, "shape": json.dumps(list(spec.shape)), "fingerprint": fingerprint}
        self._new = new_parquet(path, schema, metadata)
        self._rows = RowGroups(self._new.__enter__(), schema)

    def append(self, stored: np.ndarray, digest: int) -> None:
        sizes = () if self._is_fixed else (np.array(stored.shape, _SIZE_DTYPE).tobytes(),)
        self._rows.append((stored.tobytes(), digest, *sizes), stored.nbytes)

    def finish(self) -> None:
        self._rows.flush()
        self.abort()

    def abort(self) -> None:
        self._new.__exit__(None, None, None)


class _Hdf5Writer:
    """Spools arrays next to the file, and writes them as one dataset at the end."""

    def __init__(self, path: Path, spec: ArraySpec, fingerprint: str) -> None:
        self._path, self._spec, self._fingerprint = path, spec, fingerprint
        self._sizes: list[tuple[int, ...]] = []
        self._digests: list[int] = []
        self._spool_path = path.with_name(f"{path.name}.spool")
        self._spool = open(self._spool_path, "w+b")  # noqa: SIM115 - closed by finish and abort

    def append(self, stored: np.ndarray, digest: int) -> None:
        self._spool.write(stored.tobytes())
        self._sizes.append(stored.shape)
        self._digests.append(digest)

    def finish(self) -> None:
        spec = self._spec
        with new_hdf5(self._path) as file:
            file.attrs["dtype"] = np.bytes_(spec.dtype)
            file.attrs["shape"] = np.bytes_(json.dumps(list(spec.shape)))
            file.attrs["fingerprint"] = np.bytes_(self._fingerprint)
            digests = new_dataset(file, "digests", (len(self._digests),), DIGEST_DTYPE)
            if spec.is_fixed:
                shape = tuple(n for n in spec.shape if n is not None)
                fill(new_dataset(file, "values", (len(self._sizes), *shape), spec.disk_dtype), self._spool)
            else:
                sizes = np.array(self._sizes, _SIZE_DTYPE).reshape(-1, len(spec.shape))
                sizes_set = new_dataset(file, "sizes", sizes.shape, _SIZE_DTYPE)
                lengths = sizes.prod(axis=1, dtype=np.int64).tolist()
                values, write_offsets = new_ragged(file, "values", lengths, (), spec.disk_dtype)
                fill(values, self._spool)
                write_offsets()
                sizes_set[...] = sizes
            digests[...] = np.array(self._digests, DIGEST_DTYPE)
        self.abort()

    def abort(self) -> None:
        self._spool.close()
        self._spool_path.unlink(missing_ok=True)


class _Values(Protocol):
    def __getitem__(self, row: int) -> np.ndarray: ...


class ArrayFile:
    """An open file of arrays, of a shard's samples.

    Attributes:
        num_rows: number of arrays.
        fingerprint: `fingerprint_digest` of what made them.
    """

    def __init__(self, source: str | BinaryIO, name: str, group: ArrayGroup, *, mapped: bool = True) -> None:
        """See `open_arrays`."""
        self._name, self._group, self._spec = name, group, group.spec
        self._errors = PARQUET_ERRORS if group.format == "parquet" else HDF5_ERRORS
        with reading(name, group.format, self._errors):
            open_file = self._open_parquet if group.format == "parquet" else self._open_hdf5
            self._values, self._sizes = open_file(source, mapped)
            if self._sizes is not None and not all(map(self._spec.fits, self._sizes)):
                raise StoreError(f"{name}: an array has another shape than {self._spec}; {ADVICE}")

    def _open_parquet(self, source: str | BinaryIO, mapped: bool) -> tuple[_Values, list[tuple[int, ...]] | None]:
        file = pq.ParquetFile(source, memory_map=isinstance(source, str))
        metadata = file.metadata.metadata or {}
        self._compare({key: metadata[key.encode()].decode() for key in ("dtype", "shape")})
        self.fingerprint: str = metadata[b"fingerprint"].decode()
        self.num_rows: int = file.metadata.num_rows
        sizes, item = None, self._spec.disk_dtype.itemsize
        if (row_bytes := self._spec.row_bytes) is not None:
            lengths = np.full(self.num_rows, row_bytes, np.int64)
        else:
            column = file.read(columns=["sizes"], use_threads=False).column(0).to_pylist()
            table = np.frombuffer(b"".join(column), _SIZE_DTYPE).reshape(self.num_rows, len(self._spec.shape))
            sizes, lengths = list(map(tuple, table.tolist())), table.prod(axis=1, dtype=np.int64) * item
        prefix_bytes = 0 if sizes is None else 4
        return BlobColumn(file, source, "value", lengths, prefix_bytes=prefix_bytes, mapped=mapped), sizes

    def _open_hdf5(self, source: str | BinaryIO, mapped: bool) -> tuple[_Values, list[tuple[int, ...]] | None]:
        file = open_hdf5(source)
        self._compare({key: file.attrs[key].decode() for key in ("dtype", "shape")})
        self.fingerprint = file.attrs["fingerprint"].decode()
        values, sizes = file["values"], None
        shape = self._spec.shape if self._spec.is_fixed else ()
        if values.dtype != self._spec.disk_dtype or values.shape[1:] != shape:
            raise StoreError(f"{self._name}: values are {values.dtype} {values.shape}, not {self._spec}; {ADVICE}")
        self._file = file  # keeps it open as long as a dataset of it is read
        if self._spec.is_fixed:
            self.num_rows = len(values)
            return map_dataset(values, source), None
        table: np.ndarray = file["sizes"][()]
        sizes = list(map(tuple, table.tolist()))
        rows = RaggedRows(file, values, source, self._name)
        self.num_rows = len(rows.lengths)
        if not np.array_equal(table.prod(axis=1, dtype=np.int64), rows.lengths):
            raise StoreError(f"{self._name}: sizes do not fit offsets; {ADVICE}")
        return rows, sizes

    def _compare(self, found: Mapping[str, str]) -> None:
        expected = {"dtype": self._spec.dtype, "shape": json.dumps(list(self._spec.shape))}
        if found != expected:
            raise StoreError(f"{self._name}: holds {dict(found)}, not {expected}; {ADVICE}")

    def shape(self, row: int) -> tuple[int, ...]:
        """Of the array of one row."""
        return tuple(n or 0 for n in self._spec.shape) if self._sizes is None else self._sizes[row]

    def stored(self, row: int) -> np.ndarray:
        """The array of one row as in the file, of `ArraySpec.disk_dtype`; possibly a read-only view of it.

        Raises:
            StoreError: the file cannot be read.
        """
        try:
            return np.asarray(self._values[row]).view(self._spec.disk_dtype).reshape(self.shape(row))
        except self._errors as error:
            raise unreadable(self._name, self._group.format, error) from error

    def value(self, row: int) -> np.ndarray:
        """The array of one row, a copy; bfloat16 as float32."""
        return restore_array(self._spec, self.stored(row))


def open_arrays(source: str | BinaryIO, name: str, group: ArrayGroup, *, mapped: bool = True) -> ArrayFile:
    """Opens a file of arrays: a local path, or an open file of a remote store.

    Raises:
        StoreError: it is not such a file, or has another dtype or shape.
    """
    return ArrayFile(source, name, group, mapped=mapped)
