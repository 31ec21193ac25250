"""Records of Parquet files: a stream of them, or those at given places, a few rows in memory at a time."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, first_line
from stages.sources.records.cells import InvalidLine, top_levels
from stages.sources.records.far import open_file

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_ROWS_AT_ONCE = 16
_BUFFER_BYTES = 2**20


@contextmanager
def open_parquet(path: str) -> "Iterator[pq.ParquetFile]":
    """An open parquet file.

    Raises:
        ConfigError: it is not one, or is damaged where it was read.
    """
    import pyarrow.parquet as pq

    try:
        with open_file(path) as file:
            yield pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(
            f"source.path: {path} is not a readable parquet file: {' '.join(str(error).split()).rstrip('.')}; copy or "
            "download it again, or leave it out"
        ) from error


class ParquetRows:
    """Reads records of one file at increasing places; earlier places are read from their row group's beginning.

    Memory holds a few rows, or where the file has it so one page, never a row group.
    """

    def __init__(self, path: str, wanted: Sequence[str], optional: Sequence[str] = ()):
        """`optional` columns are left out of the records where the file has none."""
        import pyarrow.parquet as pq

        filesystem, plain = fsspec.core.url_to_fs(path)
        is_local = isinstance(filesystem, LocalFileSystem)
        self._file = None if is_local else open_file(path)
        # Mapped, as writers put a thousand images into one page: it is not copied, and only what is decoded is read.
        buffer_bytes = 0 if is_local else _BUFFER_BYTES
        self._table = pq.ParquetFile(
            self._file or plain, memory_map=is_local, buffer_size=buffer_bytes, page_checksum_verification=True
        )
        present = self._table.schema_arrow.names
        self._names = top_levels([*wanted, *(name for name in optional if name in present)], present)
        sizes = [self._table.metadata.row_group(group).num_rows for group in range(self._table.num_row_groups)]
        self._ends = list(accumulate(sizes))
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._group = -1
        self._damage: InvalidLine | None = None
        self._batch: pa.RecordBatch | None = None
        self._first = 0
        """Number of the batch's first row in the file."""

    def read(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The records at these row numbers, counted from 0.

        From a damaged page to the end of its row group they are `InvalidLine` (`unreadable_row`).

        Raises:
            OSError: the file, but not what is in it, cannot be read.
        """
        for number in numbers:
            group = bisect_right(self._ends, number)
            if group != self._group or number < self._first:
                self._open(group)
            try:
                yield self._record(number)
            except (pa.ArrowException, MemoryError, OSError) as error:
                if getattr(error, "errno", None) is not None:  # what pyarrow finds wrong with the content has none
                    raise
                reason = "out_of_memory" if isinstance(error, MemoryError) else "unreadable_row"
                self._damage = InvalidLine(first_line(error), reason)
                yield self._damage

    def _record(self, number: int) -> dict[str, Any]:
        if self._damage is not None:
            return self._damage
        while self._batch is None or number >= self._first + self._batch.num_rows:
            self._first += 0 if self._batch is None else self._batch.num_rows
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise pa.ArrowInvalid(f"row group {self._group} has fewer rows than the footer says")
        return to_records(self._batch.slice(number - self._first, 1))[0] if self._names else {}

    def _open(self, group: int) -> None:
        self._batch = None
        self._batches = self._table.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=self._names)
        self._group, self._first, self._damage = group, self._ends[group - 1] if group else 0, None

    def close(self) -> None:
        self._batch, self._batches = None, iter(())
        self._table.close(force=True)


def to_records(batch: "pa.RecordBatch | pa.Table | list[dict[str, Any]]") -> list[dict[str, Any]]:
    """Rows as dicts; text that is not UTF-8, though the schema says it is, becomes surrogate escapes."""
    if isinstance(batch, list):
        return batch
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = [_lossless(batch.column(name)) for name in batch.column_names]
        return [dict(zip(batch.column_names, values, strict=True)) for values in zip(*columns, strict=True)]


def _lossless(column: "pa.Array | pa.ChunkedArray") -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast(_as_binary(column.type))
        return [_decoded(value, column.type) for value in raw.to_pylist()]


def _as_binary(kind: "pa.DataType") -> "pa.DataType":
    """The type with every text in it as bytes."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.large_binary()
    if pa.types.is_dictionary(kind):
        return _as_binary(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(_as_binary(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _as_binary(field.type)) for field in kind])
    return kind


def _decoded(value: Any, kind: "pa.DataType") -> Any:
    """A value of the type `_as_binary(kind)` as one of `kind`."""
    if pa.types.is_dictionary(kind):
        return _decoded(value, kind.value_type)
    if isinstance(value, list) and not pa.types.is_map(kind):
        return [_decoded(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return value.decode("utf-8", "surrogateescape") if is_text and isinstance(value, bytes) else value
