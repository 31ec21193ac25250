"""Parquet files of a store: lean and byte-identical for the same rows.

No dictionary, compression, statistics or Arrow schema: an embedding costs 16 bytes in addition to its
payload, and the payload is the same in the file as in memory, so a local reader maps it (see parquet_column.py).
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imagen_core.store.errors import ADVICE, StoreError, reading, unreadable
from imagen_core.store.files.digest import DIGEST_DTYPE
from imagen_core.store.files.parquet_column import BlobColumn
from imagen_core.store.files.ragged import DISK_DTYPES, SCALE_DTYPE, StoredEmbedding
from imagen_core.store.layout import ROW_GROUP_BYTES, StoreDtype

PARQUET_ERRORS = (pa.ArrowException, OSError, KeyError, IndexError, ValueError, TypeError, EOFError)  # of pyarrow


def required(name: str, kind: pa.DataType) -> pa.Field:
    """A column without NULL."""
    return pa.field(name, kind, nullable=False)


DIGEST_FIELD = required("digest", pa.uint64())


class RowGroups:
    """Collects rows, and writes a row group whenever it has ROW_GROUP_BYTES."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._rows: list[tuple[Any, ...]] = []
        self._num_bytes = 0

    def append(self, row: tuple[Any, ...], num_bytes: int) -> None:
        self._rows.append(row)
        self._num_bytes += num_bytes
        if self._num_bytes >= ROW_GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            values = zip(zip(*self._rows, strict=True), self._schema, strict=True)
            columns = [pa.array(column, field.type) for column, field in values]
            self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(self._rows))
            self._rows, self._num_bytes = [], 0


def write_embeddings_parquet(
    path: str | os.PathLike[str],
    embeddings: Iterable[tuple[StoredEmbedding, int]],
    dim: int,
    dtype: StoreDtype,
    fingerprint: str,
) -> None:
    """Write a shard's embeddings with their digests: columns num_tokens, embedding, digest and, for int8, scale."""
    fields = [required("num_tokens", pa.int32()), required("embedding", pa.binary()), DIGEST_FIELD]
    if dtype == "int8":
        fields.append(required("scale", pa.binary()))
    schema = pa.schema(fields)
    with new_parquet(path, schema, {"dtype": dtype, "dim": str(dim), "fingerprint": fingerprint}) as writer:
        rows = RowGroups(writer, schema)
        for stored, digest in embeddings:
            row = (len(stored.values), stored.values.tobytes(), digest)
            rows.append(row if stored.scales is None else (*row, stored.scales.tobytes()), stored.values.nbytes)
        rows.flush()


class ParquetEmbeddings:
    """Random access to the embeddings of a shard; see `EmbeddingFile`."""

    def __init__(self, source: str | BinaryIO, name: str, dim: int, dtype: StoreDtype, *, mapped: bool = True) -> None:
        self._name, self._dim, self._dtype = name, dim, DISK_DTYPES[dtype]
        with reading(name, "parquet", PARQUET_ERRORS):
            file = pq.ParquetFile(source, memory_map=isinstance(source, str))
            meta = file.metadata.metadata or {}
            found = (meta[b"dtype"].decode(), int(meta[b"dim"]))
            self.fingerprint: str = meta.get(b"fingerprint", b"").decode()
            if found != (dtype, dim):
                raise StoreError(f"{name}: holds (dtype, dim) {found}, not {(dtype, dim)}; {ADVICE}")
            self.num_tokens: np.ndarray = read_counts(file, "num_tokens")
            token_bytes = dim * self._dtype.itemsize
            self._values = BlobColumn(
                file, source, "embedding", self.num_tokens * token_bytes, prefix_bytes=4, mapped=mapped
            )
            self._scales = None
            if dtype == "int8":
                lengths = self.num_tokens * SCALE_DTYPE.itemsize
                self._scales = BlobColumn(file, source, "scale", lengths, prefix_bytes=4, mapped=mapped)

    @property
    def num_rows(self) -> int:
        """Number of embeddings."""
        return len(self.num_tokens)

    def stored(self, row: int) -> StoredEmbedding:
        """The embedding of a row as stored; possibly a read-only view of the file."""
        try:
            values = self._values[row].view(self._dtype).reshape(-1, self._dim)
            return StoredEmbedding(values, None if self._scales is None else self._scales[row].view(SCALE_DTYPE))
        except PARQUET_ERRORS as error:
            raise unreadable(self._name, "parquet", error) from error


def read_counts(file: pq.ParquetFile, name: str) -> np.ndarray:
    """A column of counts, int64."""
    return file.read(columns=[name], use_threads=False).column(0).to_numpy().astype(np.int64)


def parquet_digests(source: str | BinaryIO, name: str) -> np.ndarray | None:
    """The digest of each row, uint64; None in a file of schema 1."""
    with reading(name, "parquet", PARQUET_ERRORS):
        file = pq.ParquetFile(source)
        if "digest" not in file.schema_arrow.names:
            return None
        return file.read(columns=["digest"], use_threads=False).column(0).to_numpy().astype(DIGEST_DTYPE)


@contextmanager
def new_parquet(
    path: str | os.PathLike[str], schema: pa.Schema, metadata: dict[str, str]
) -> Iterator[pq.ParquetWriter]:
    """A new file of a store: the same rows give the same bytes."""
    writer = pq.ParquetWriter(
        os.fspath(path),
        schema,
        version="2.6",
        compression="NONE",
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
        data_page_size=1 << 30,  # one page per column chunk: its rows are contiguous
    )
    try:
        with writer:
            if metadata:
                writer.add_key_value_metadata(metadata)
            yield writer
    finally:
        writer.is_open = False  # its __del__ would close a second time what failed to close, and print a traceback
