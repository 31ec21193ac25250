"""The `samples` file of a shard: one row per sample, and what became of every other input row."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imagen_core.store.errors import reading
from imagen_core.store.files.arrow_column import arrow_column, as_numpy
from imagen_core.store.files.parquet import PARQUET_ERRORS, new_parquet, required
from imagen_core.store.layout import ColumnType, ColumnValue, ImageInfo, SampleRow

_SAMPLES_SCHEMA = pa.schema(
    [
        required("key", pa.string()),
        required("captions", pa.list_(required("element", pa.string()))),
        required("caption_ids", pa.list_(required("element", pa.int32()))),
        pa.field("url", pa.string()),
        required("sha256", pa.string()),
        required("width", pa.int32()),
        required("height", pa.int32()),
        required("input_row", pa.int32()),
    ]
)
_OPTIONAL_COLUMNS = (  # only in files where some row has a value
    pa.field("transcription", pa.string()),
    pa.field("safebox", pa.list_(required("element", pa.int32()))),
    pa.field("label", pa.int32()),
)
_COLUMN_TYPES: dict[ColumnType, pa.DataType] = {
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "text": pa.string(),
}


def write_samples(
    path: str | os.PathLike[str],
    rows: Sequence[SampleRow],
    *,
    num_input_rows: int | None = None,
    dropped: Mapping[str, Sequence[int]] | None = None,
    columns: Mapping[str, ColumnType] | None = None,
) -> None:
    """Write a shard's `samples` file, which accounts for every row of the shard's input.

    Args:
        num_input_rows: rows of the shard's input; None means the number of samples and dropped rows.
        dropped: input rows that did not become samples, by reason.
        columns: types of the columns that are kept of the source; a row without a value has NULL.
    Raises:
        ValueError: a row has no captions, or not one caption_id per caption; an input row is neither a sample nor
            dropped, or occurs twice.
    """
    dropped, columns = dropped or {}, columns or {}
    used = Counter(row.input_row for row in rows) + Counter(row for rows in dropped.values() for row in rows)
    num_input_rows = used.total() if num_input_rows is None else num_input_rows
    if wrong := [row for row in {*used, *range(num_input_rows)} if used[row] != 1 or not 0 <= row < num_input_rows]:
        raise ValueError(
            f"input rows {sorted(wrong)[:10]} of {num_input_rows}: each must be one sample, or dropped for one reason"
        )
    for row in rows:
        if not row.captions or len(row.captions) != len(row.caption_ids):
            raise ValueError(
                f"sample {row.key!r}: {len(row.captions)} captions and {len(row.caption_ids)} caption_ids; "
                "give one id per caption, and at least one caption"
            )
    used_columns = [c for c in _OPTIONAL_COLUMNS if any(getattr(row, c.name) is not None for row in rows)]
    own = pa.schema([*_SAMPLES_SCHEMA, *used_columns])
    arrays = [arrow_column([getattr(row, field.name) for row in rows], field.type) for field in own]
    kept = [pa.field(name, _COLUMN_TYPES[kind]) for name, kind in columns.items()]
    arrays += [arrow_column([row.columns.get(field.name) for row in rows], field.type) for field in kept]
    schema = pa.schema([*own, *kept])
    metadata = {"input_rows": str(num_input_rows), "dropped": json.dumps(dropped, sort_keys=True)}
    if columns:
        metadata["columns"] = json.dumps(dict(columns))
    with new_parquet(path, schema, metadata) as writer:
        if rows:
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=len(rows))


def read_samples(path: str | os.PathLike[str]) -> list[SampleRow]:
    """All rows of a local `samples` file.

    Raises:
        StoreError: missing, or not such a file.
    """
    samples = SamplesFile(os.fspath(path), os.fspath(path))
    return [samples.row(row) for row in range(samples.num_rows)]


def read_columns(source: str | BinaryIO, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a `samples` file, in their order; no other bytes are read.

    Annotations that the file lacks are null in their type, and columns that it does not have in the null type.

    Raises:
        StoreError: `name` is missing, or not such a file.
    """
    with reading(name, "parquet", PARQUET_ERRORS):
        file = pq.ParquetFile(source)
        present = [column for column in columns if column in file.schema_arrow.names]
        table, num_rows = file.read(columns=present, use_threads=False), file.metadata.num_rows
        types = {field.name: field.type for field in _OPTIONAL_COLUMNS}
        lacking = {column: pa.nulls(num_rows, types.get(column, pa.null())) for column in columns}
        return pa.table({column: table[column] if column in present else lacking[column] for column in columns})


class SamplesFile:
    """The `samples` file of a shard, in memory by column; reading a row does not call pyarrow.

    Attributes:
        num_rows: number of rows, excluded ones included.
        num_input_rows: rows of the shard's input; None in a store of schema 1.
        dropped: input rows that did not become samples, by reason.
        column_types: of the columns that were kept of the source.
    """

    def __init__(self, source: str | BinaryIO, name: str) -> None:
        """
        Args:
            source: path of a local file, or an open remote file.
            name: of the file, for error messages.
        Raises:
            StoreError: it is missing, or not such a file.
        """
        with reading(name, "parquet", PARQUET_ERRORS):
            file = pq.ParquetFile(source)
            metadata = file.metadata.metadata or {}
            self.num_input_rows = int(metadata[b"input_rows"]) if b"input_rows" in metadata else None
            self.dropped: dict[str, list[int]] = json.loads(metadata.get(b"dropped", b"{}"))
            self.column_types: dict[str, ColumnType] = json.loads(metadata.get(b"columns", b"{}"))
            table = file.read(use_threads=False)
            if self.num_input_rows is None:
                table = table.append_column("input_row", pa.array([-1] * table.num_rows, pa.int32()))
            for column in _OPTIONAL_COLUMNS:
                if column.name not in table.column_names:
                    table = table.append_column(column, pa.nulls(table.num_rows, column.type))
            columns = {name: table[name].combine_chunks() for name in table.column_names}
            self.num_rows: int = table.num_rows
            self._ids: list[int] = columns["caption_ids"].flatten().to_pylist()
            self._first_id = list_offsets(columns["caption_ids"])
            self._first_caption = list_offsets(columns["captions"])
            self._captions = Strings(columns["captions"].flatten())
            self._keys, self._urls, self._sha256s = (Strings(columns[name]) for name in ("key", "url", "sha256"))
            self._has_url: list[bool] = columns["url"].is_valid().to_pylist()
            self._transcriptions = Strings(columns["transcription"])
            self._has_transcription: list[bool] = columns["transcription"].is_valid().to_pylist()
            boxes = columns["safebox"].to_pylist()
            self._safeboxes = [None if box is None else tuple(box) for box in boxes]
            numbers = (columns[name].to_pylist() for name in ("width", "height", "input_row", "label"))
            self._widths, self._heights, self._input_rows, self._labels = numbers
            self._columns: dict[str, list[ColumnValue]] = {
                name: columns[name].to_pylist() for name in self.column_types
            }

    def key(self, row: int) -> str:
        """The sample's key."""
        return self._keys[row]

    def texts(self, name: str) -> "Strings":
        """The column key, url ("" without one) or sha256; a value is decoded when it is accessed."""
        return {"key": self._keys, "url": self._urls, "sha256": self._sha256s}[name]

    def transcription(self, row: int) -> str | None:
        """The text written in the image, "" if there is none, None if unknown."""
        return self._transcriptions[row] if self._has_transcription[row] else None

    def label(self, row: int) -> int | None:
        """The image's class, from 0; None if unknown."""
        return self._labels[row]

    def kept(self, row: int, name: str) -> ColumnValue:
        """The value of a column that was kept of the source; None for NULL."""
        return self._columns[name][row]

    def caption(self, row: int, number: int) -> str:
        """One of a sample's captions, by its index."""
        return self._captions[self._first_caption[row] + number]

    def caption_ids(self, row: int) -> list[int]:
        """Row of each of the sample's captions in the shard's text groups."""
        return self._ids[self._first_id[row] : self._first_id[row + 1]]

    def column(self, name: str) -> list[Any]:
        """One field of `SampleRow` of all rows."""
        return [getattr(self.row(row), name) for row in range(self.num_rows)]

    def size(self, row: int) -> tuple[int, int]:
        """Width and height of the original image in pixels; 0 and 0 if its content was erased."""
        return self._widths[row], self._heights[row]

    def image(self, row: int) -> ImageInfo:
        """What a crop needs to know about the original image."""
        return ImageInfo(self._widths[row], self._heights[row], self.transcription(row), self._safeboxes[row])

    def fields(self, row: int) -> tuple[Any, ...]:
        """The fields of `SampleRow` in its order."""
        text, starts = self._captions, self._first_caption
        return (
            self._keys[row],
            [text[i] for i in range(starts[row], starts[row + 1])],
            self.caption_ids(row),
            self._urls[row] if self._has_url[row] else None,
            self._sha256s[row],
            self._widths[row],
            self._heights[row],
            self._input_rows[row],
            self.transcription(row),
            self._safeboxes[row],
            self._labels[row],
            {name: values[row] for name, values in self._columns.items()},
        )

    def row(self, row: int) -> SampleRow:
        """One sample."""
        key, captions, caption_ids, *others = self.fields(row)
        return SampleRow(key, tuple(captions), tuple(caption_ids), *others)


def list_offsets(lists: pa.ListArray) -> list[int]:
    """Where each row's items start in the flattened column, and where the last row's end."""
    return [0, *np.cumsum(as_numpy(lists.value_lengths())).tolist()]


class Strings:
    """A column of strings in pyarrow's form: all bytes, and where each string starts."""

    def __init__(self, column: pa.StringArray) -> None:
        column = column.cast(pa.string())
        _, offsets, data = column.buffers()
        self._data: bytes = data.to_pybytes() if data else b""
        self._offsets = [0]
        if len(column):
            self._offsets = np.frombuffer(offsets, np.int32, len(column) + 1, column.offset * 4).tolist()

    def __getitem__(self, row: int) -> str:
        return self._data[self._offsets[row] : self._offsets[row + 1]].decode()
