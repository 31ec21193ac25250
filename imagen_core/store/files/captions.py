"""The file of a further set of captions of a shard: one row per sample, which may have none."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from imagen_core.store.errors import reading
from imagen_core.store.files.arrow_column import arrow_column
from imagen_core.store.files.digest import captions_digest
from imagen_core.store.files.parquet import DIGEST_FIELD, PARQUET_ERRORS, new_parquet, required
from imagen_core.store.files.samples import Strings, list_offsets

_SCHEMA = pa.schema(
    [
        required("captions", pa.list_(required("element", pa.string()))),
        required("caption_ids", pa.list_(required("element", pa.int32()))),
        DIGEST_FIELD,
    ]
)


_MADE_SCHEMA = pa.schema(
    [
        *_SCHEMA,
        required("seeds", pa.list_(required("element", pa.int64()))),
        required("finish_reasons", pa.list_(required("element", pa.string()))),
    ]
)
"""Of captions that a model wrote."""


@dataclass(frozen=True, slots=True)
class RowCaptions:
    """The captions that a sample has of a set; `captions[k]` is row `ids[k]` of the set's text groups in the shard.

    Where a model wrote them, `seeds[k]` is the seed of the request and `finish_reasons[k]` why it ended, "" if that is
    not known; they are empty otherwise.
    """

    captions: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    finish_reasons: tuple[str, ...] = ()


def number_captions(rows: Iterable[Sequence[str]]) -> list[RowCaptions]:
    """The captions of a shard's rows with ids: equal captions have one id, counted from 0 in the order of rows."""
    ids: dict[str, int] = {}
    return [RowCaptions(tuple(row), tuple(ids.setdefault(caption, len(ids)) for caption in row)) for row in rows]


def distinct_captions(rows: Iterable[RowCaptions]) -> list[str]:
    """The captions by id."""
    found = {i: caption for row in rows for i, caption in zip(row.ids, row.captions, strict=True)}
    return [found[i] for i in range(len(found))]


def caption_ids_problem(rows: Sequence[RowCaptions]) -> str | None:
    """What is wrong with the ids of a shard's captions: each must be of one caption, and they count from 0."""
    caption_of: dict[int, str] = {}
    for number, row in enumerate(rows):
        if len(row.captions) != len(row.ids):
            return f"row {number}: {len(row.captions)} captions, ids {row.ids}"
        for caption_id, caption in zip(row.ids, row.captions, strict=True):
            if caption_of.setdefault(caption_id, caption) != caption:
                return f"row {number}: caption id {caption_id} is of another caption too"
    return (
        None if set(caption_of) == set(range(len(caption_of))) else f"caption ids are not 0 to {len(caption_of) - 1}"
    )


def write_captions(path: str | os.PathLike[str], keys: Sequence[str], rows: Sequence[RowCaptions]) -> None:
    """Write a shard's file of a set of captions.

    Args:
        keys: of the samples, in the order of `samples`; each row has a digest that binds it to its sample.
    """
    digests = [captions_digest(key, row.captions) for key, row in zip(keys, rows, strict=True)]
    values: list[Sequence[Any]] = [[row.captions for row in rows], [row.ids for row in rows], digests]
    schema = _SCHEMA
    if any(row.seeds for row in rows):
        schema = _MADE_SCHEMA
        values += [[row.seeds for row in rows], [row.finish_reasons for row in rows]]
    columns = [arrow_column(column, field.type) for column, field in zip(values, schema, strict=True)]
    with new_parquet(path, schema, {}) as writer:
        if rows:
            writer.write_table(pa.table(columns, schema=schema), row_group_size=len(rows))


def read_caption_columns(source: str | BinaryIO, name: str) -> pa.Table:
    """The columns `captions` and `caption_ids` of a set in a shard, one row per sample; arguments as `CaptionsFile`.

    Raises:
        StoreError: it is missing, or not such a file.
    """
    with reading(name, "parquet", PARQUET_ERRORS):
        return _read_columns(source, ["captions", "caption_ids"])


def _read_columns(source: str | BinaryIO, columns: list[str]) -> pa.Table:
    file = pq.ParquetFile(source)
    return file.read(columns=[name for name in columns if name in file.schema_arrow.names], use_threads=False)


class CaptionsFile:
    """The captions of a set in a shard, in memory by column.

    Attributes:
        num_rows: number of rows, excluded ones included.
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
            table = _read_columns(source, ["captions", "caption_ids", "seeds", "finish_reasons"])
            captions, ids = (table[column].combine_chunks() for column in ("captions", "caption_ids"))
            self.num_rows: int = table.num_rows
            self._first_caption, self._first_id = list_offsets(captions), list_offsets(ids)
            self._captions = Strings(captions.flatten())
            self._ids: list[int] = ids.flatten().to_pylist()
            self._made = [table[n].to_pylist() for n in ("seeds", "finish_reasons") if n in table.column_names]

    def caption(self, row: int, number: int) -> str:
        """One of a sample's captions, by its index."""
        return self._captions[self._first_caption[row] + number]

    def caption_ids(self, row: int) -> list[int]:
        """Row of each of the sample's captions in the set's text groups; none if it has no caption."""
        return self._ids[self._first_id[row] : self._first_id[row + 1]]

    def captions(self, row: int) -> list[str]:
        """A sample's captions."""
        return [self._captions[place] for place in range(self._first_caption[row], self._first_caption[row + 1])]

    def row(self, row: int) -> RowCaptions:
        """A sample's captions, with their ids and what made them."""
        made = (tuple(column[row]) for column in self._made)
        return RowCaptions(tuple(self.captions(row)), tuple(self.caption_ids(row)), *made)

    def rows(self) -> list[RowCaptions]:
        """All rows."""
        return [self.row(row) for row in range(self.num_rows)]


def read_captions(path: str | os.PathLike[str]) -> list[RowCaptions]:
    """All rows of a local file; raises like `CaptionsFile`."""
    return CaptionsFile(os.fspath(path), os.fspath(path)).rows()
