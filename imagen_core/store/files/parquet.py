"""Parquet files of a store: lean and byte-identical for the same rows.

No dictionary, compression, statistics or Arrow schema: an embedding costs 16 bytes in addition to its
payload, and the payload is the same in the file as in memory, so a local reader maps it (see parquet_column.py).
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imagen_core.store.errors import reading, unreadable
from imagen_core.store.files.arrow_column import arrow_column, as_numpy
from imagen_core.store.files.digest import DIGEST_DTYPE
from imagen_core.store.files.layers import OnFirstUse, check_held, stored_row
from imagen_core.store.files.parquet_column import BlobColumn
from imagen_core.store.files.ragged import DISK_DTYPES, SCALE_DTYPE, StoredEmbedding
from imagen_core.store.layout import ROW_GROUP_BYTES, StoreDtype, layer_suffixes
from imagen_core.store.records import EmbeddingGroup

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
            columns = [arrow_column(column, field.type) for column, field in values]
            self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(self._rows))
            self._rows, self._num_bytes = [], 0


def write_embeddings_parquet(
    path: str | os.PathLike[str],
    embeddings: Iterable[tuple[StoredEmbedding, int]],
    dim: int,
    dtype: StoreDtype,
    fingerprint: str,
    layers: Sequence[int] = (),
    num_scales: int = 1,
) -> None:
    """Write a shard's embeddings with their digests: columns num_tokens, embedding, digest and, for int8, scale; of
    layers embedding_N and scale_N of each."""
    suffixes = layer_suffixes(layers)
    fields = [required("num_tokens", pa.int32())]
    fields += [*(required(f"embedding{suffix}", pa.binary()) for suffix in suffixes), DIGEST_FIELD]
    if dtype == "int8":
        fields += [required(f"scale{suffix}", pa.binary()) for suffix in suffixes]
    schema, metadata = pa.schema(fields), {"dtype": dtype, "dim": str(dim), "fingerprint": fingerprint}
    if layers:
        metadata["layers"] = json.dumps(list(layers))
    if num_scales > 1:
        metadata["num_scales"] = str(num_scales)
    with new_parquet(path, schema, metadata) as writer:
        rows = RowGroups(writer, schema)
        for stored, digest in embeddings:
            parts = stored.parts()
            scales = [part.scales.tobytes() for part in parts if part.scales is not None]
            row = (len(stored.values), *(part.values.tobytes() for part in parts), digest, *scales)
            rows.append(row, stored.values.nbytes)
        rows.flush()


class ParquetEmbeddings:
    """Random access to the embeddings of a shard; see `EmbeddingFile`."""

    def __init__(self, source: str | BinaryIO, name: str, group: EmbeddingGroup, *, mapped: bool = True) -> None:
        self._name, self._group, self._dtype = name, group, DISK_DTYPES[group.dtype]
        with reading(name, "parquet", PARQUET_ERRORS):
            file = pq.ParquetFile(source, memory_map=isinstance(source, str))
            meta = file.metadata.metadata or {}
            found = (meta[b"dtype"].decode(), int(meta[b"dim"]))
            held = (tuple(json.loads(meta.get(b"layers", b"[]"))), int(meta.get(b"num_scales", b"1")))
            self.fingerprint: str = meta.get(b"fingerprint", b"").decode()
            check_held(name, group, found, held)
            self.num_tokens: np.ndarray = read_counts(file, "num_tokens")
            token_bytes = group.dim * self._dtype.itemsize

            # Columns of layers may be opened after the file was deleted.
            data = np.memmap(source, np.uint8, "r") if group.layers and mapped and isinstance(source, str) else None

            def column(start: str, suffix: str, row_bytes: int) -> BlobColumn:
                lengths = self.num_tokens * row_bytes
                return BlobColumn(file, source, f"{start}{suffix}", lengths, prefix_bytes=4, mapped=mapped, data=data)

            def columns(suffix: str) -> tuple[BlobColumn, BlobColumn | None]:
                scales = None
                if group.dtype == "int8":
                    scales = column("scale", suffix, group.num_scales * SCALE_DTYPE.itemsize)
                return column("embedding", suffix, token_bytes), scales

            if group.layers:
                self._columns = OnFirstUse(columns)  # of a layer that nobody asks for no byte is read
            else:
                self._columns = {"": columns("")}

    @property
    def num_rows(self) -> int:
        """Number of embeddings."""
        return len(self.num_tokens)

    def stored(self, row: int, layers: Sequence[int] | None = None) -> StoredEmbedding:
        """The embedding of a row as stored; without layers possibly a read-only view of the file."""
        return stored_row(self._group, layers, lambda suffix: self._part(row, suffix))

    def _part(self, row: int, suffix: str) -> StoredEmbedding:
        try:
            values, scales = self._columns[suffix]
            found = values[row].view(self._dtype).reshape(-1, self._group.dim)
            if scales is None:
                return StoredEmbedding(found)
            scale, parts = scales[row].view(SCALE_DTYPE), self._group.num_scales
            return StoredEmbedding(found, scale if parts == 1 else scale.reshape(-1, parts))
        except PARQUET_ERRORS as error:
            raise unreadable(self._name, "parquet", error) from error


def read_counts(file: pq.ParquetFile, name: str) -> np.ndarray:
    """A column of counts, int64."""
    return _integers(file, name).astype(np.int64)


def _integers(file: pq.ParquetFile, name: str) -> np.ndarray:
    return as_numpy(file.read(columns=[name], use_threads=False).column(0).combine_chunks())


def parquet_digests(source: str | BinaryIO, name: str) -> np.ndarray | None:
    """The digest of each row, uint64; None in a file of schema 1."""
    with reading(name, "parquet", PARQUET_ERRORS):
        file = pq.ParquetFile(source)
        if "digest" not in file.schema_arrow.names:
            return None
        return _integers(file, "digest").astype(DIGEST_DTYPE)


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
