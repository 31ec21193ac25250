"""Streams the records of tables: txt, csv, tsv, jsonl and parquet, one or many files, plain or compressed."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from imagen_core.far import is_far
from imagen_core.store import ColumnType
from pipeline.errors import ConfigError
from stages.digests import version_of
from stages.lines import stream_lines
from stages.sources.base import InputPart
from stages.sources.records.cells import InvalidLine, top_level, top_levels
from stages.sources.records.compressed import DAMAGED, SUFFIXES, open_whole
from stages.sources.records.far import open_file
from stages.sources.records.kept import Kept, types_of_records, types_of_tables
from stages.sources.records.parquet import open_parquet, to_records
from stages.sources.records.regular import Chunk, text_chunks
from stages.sources.records.text import Record, csv_records, json_records, tsv_records
from stages.sources.records.types import Columns

if TYPE_CHECKING:
    import pyarrow.parquet as pq

    from stages.sources.tabular.where import RowFilter

FORMATS = ("txt", "csv", "tsv", "jsonl", "parquet")
TYPED = ("csv", "tsv", "parquet")
"""Formats whose head names all columns."""
HEAD_ROWS = 1000
"""Of text and JSON, by which the types of kept columns are known."""
_BATCH_ROWS = 4096
_COLUMN_ROWS = 2**14
_MAX_AHEAD_ROWS = 2**17
"""Decoded at most to reach a row."""
_HEAD_BYTES = 2**16
_TEXTS = {"csv": csv_records, "tsv": tsv_records, "jsonl": json_records}


def table_format(path: str) -> str:
    """The format that a file name says, such as `csv` for `a.csv.gz`; the bare suffix if unknown."""
    name = path.lower()
    for compression in SUFFIXES:
        name = name.removesuffix(compression)
    return name.rpartition(".")[2].replace("ndjson", "jsonl").replace("pq", "parquet")


def columns(path: str, wanted: Iterable[str] = (), most_rows: int | None = None) -> Columns:
    """Columns of a table: names in the first line, Parquet's schema, or the keys of all JSON objects.

    Args:
        wanted: columns, or paths into nested ones; JSON is read only as far as until all were seen.
        most_rows: of JSON at most so many are read.

    Raises:
        ConfigError: no line can be parsed.
    """
    kind = table_format(path)
    if kind == "txt":
        return {"url": None}
    if kind == "parquet":
        with open_parquet(path) as table:
            return {field.name: field.type for field in table.schema_arrow}
    if kind == "jsonl":
        return _keys(islice(_parsed([path]), most_rows), wanted)
    return _keys(islice(_parsed([path]), 1), ())


def json_columns(files: Iterable[str], wanted: Iterable[str]) -> Columns:
    """The keys of all JSON objects in some files, which may leave some out each; see `columns`."""
    return _keys(_parsed(files), wanted)


def _keys(records: Iterable[Record], wanted: Iterable[str]) -> Columns:
    found: dict[str, None] = {}
    missing = set(wanted)
    for record in records:
        if not record.keys() <= found.keys():
            found.update(dict.fromkeys(record))
            missing = {column for column in missing if top_level(column, found) is None}
            if wanted and not missing:
                break
    return found


def _parsed(files: Iterable[str]) -> Iterator[Record]:
    """The records of some files.

    Raises:
        ConfigError: there are lines, and none can be parsed.
    """
    invalid, some = "", False
    for path in files:
        for record in read_rows(path, None):
            if isinstance(record, InvalidLine):
                invalid = invalid or f"{path}: {record.detail}"
                continue
            some = True
            yield record
    if invalid and not some:
        raise ConfigError(f"source.path: {invalid}, and no other line can be used; write the file again")


def kept_types(keep: Kept, files: Sequence[str]) -> dict[str, ColumnType]:
    """The types of columns to keep: those of Parquet, or else what the first rows of the other files hold."""
    found = types_of_tables(keep, ((file, columns(file)) for file in files if table_format(file) == "parquet"))
    unknown = [name for name, kind in keep.items() if kind is None and name not in found]
    texts = (file for file in files if table_format(file) != "parquet")
    if not unknown:
        return found
    records = (record for file in texts for record in read_rows(file, None))
    return {**found, **types_of_records(unknown, islice(records, HEAD_ROWS))}


def estimate_rows(files: Sequence[str]) -> int | None:
    """About how many rows the files have: exact for parquet; else from the size of the first rows.

    None for compressed text, whose size says little.
    """
    total = 0.0
    for path in files:
        if table_format(path) == "parquet":
            with open_parquet(path) as table:
                total += table.metadata.num_rows
        elif path.lower().endswith(tuple(SUFFIXES)):
            return None
        else:
            with open_file(path) as file:
                head = file.read(_HEAD_BYTES)
                size = file.seek(0, 2)
            total += size / len(head) * max(1, head.count(b"\n")) if head else 0
    return round(total)


def read_rows(path: str, wanted: Sequence[str] | None) -> Iterator[Record]:
    """Streams the rows of one file as dicts; bytes that are not UTF-8 become surrogate escapes.

    A line of text that cannot be parsed is an `InvalidLine`; a blank line is no row.

    Args:
        wanted: columns, or paths into nested ones, that are read of Parquet; None: all.

    Raises:
        ConfigError: the format is unknown or the file cannot be read.
    """
    kind = table_format(path)
    if kind not in FORMATS:
        raise ConfigError(f"source.path: {path}: format {kind!r} is not supported; use {', '.join(FORMATS)}")
    if kind == "parquet":
        yield from _parquet_rows(path, wanted)
        return
    try:
        with open_whole(path) as file:
            lines = stream_lines(file)
            if kind == "txt":
                yield from ({"url": line.strip()} for line in lines if line.strip())
            else:
                yield from _TEXTS[kind](lines)
    except (*DAMAGED, ValueError) as error:
        raise ConfigError(f"source.path: {path} cannot be read to its end: {error}; write the file again") from error


def count_rows(path: str) -> int:
    """How many rows `read_rows` gives; for parquet from the footer, for text by reading it."""
    if table_format(path) == "parquet":
        with open_parquet(path) as table:
            return table.metadata.num_rows
    return sum(_size(chunk) for chunk in read_chunks(path, []))


def read_parts(folder: str, parts: Iterable[InputPart], wanted: Sequence[str]) -> Iterator[tuple[InputPart, Record]]:
    """Streams the records of parts of tables in `folder`. Reads on where a part follows the previous one."""
    for part, _, cursor in parts_with_cursors(folder, parts, wanted):
        for chunk in cursor.take(part.rows):
            assert not isinstance(chunk, range)  # nothing is filtered
            yield from ((part, record) for record in to_records(chunk))


def read_chunks(
    path: str, wanted: Sequence[str], first: int = 0, row_filter: "RowFilter | None" = None
) -> Iterator[Chunk | range]:
    """The rows that `read_rows` gives from number `first` on, as columns where they can be read as columns.

    Of row groups of Parquet in which `row_filter` keeps no row its columns are read at most: a range stands for their
    rows.

    Raises:
        ConfigError: the format is unknown or the file cannot be read.
    """
    kind = table_format(path)
    if kind == "parquet":
        with open_parquet(path) as table:
            groups, skipped = _groups_from(table.metadata, first)
            names = top_levels(wanted, table.schema_arrow.names)
            yield from _behind(_group_chunks(table, names, groups, row_filter), skipped)
        return
    if kind not in FORMATS:
        raise ConfigError(f"source.path: {path}: format {kind!r} is not supported; use {', '.join(FORMATS)}")
    try:
        with open_whole(path) as file:
            yield from _behind(text_chunks(kind, file, wanted), first)
    except (*DAMAGED, ValueError) as error:
        raise ConfigError(f"source.path: {path} cannot be read to its end: {error}; write the file again") from error


def _group_chunks(
    table: "pq.ParquetFile", names: list[str], groups: list[int], row_filter: "RowFilter | None"
) -> Iterator[Chunk | range]:
    if row_filter is None:
        for some in _together(table.metadata, groups):
            yield from table.iter_batches(batch_size=_COLUMN_ROWS, columns=names, row_groups=some)
        return
    may_match = row_filter.may_match(table, groups)
    for is_read, together in groupby(groups, key=may_match.__contains__):
        if not is_read:
            yield range(sum(table.metadata.row_group(group).num_rows for group in together))
            continue
        for group in together:
            if _has_kept(table, names, group, row_filter):
                yield from table.iter_batches(batch_size=_COLUMN_ROWS, columns=names, row_groups=[group])
            else:
                yield range(table.metadata.row_group(group).num_rows)


def _together(metadata: "pq.FileMetaData", groups: Sequence[int]) -> Iterator[list[int]]:
    """Consecutive row groups with not many rows in all: pyarrow holds what it has read of all that it is told."""
    some: list[int] = []
    rows = 0
    for group in groups:
        size = metadata.row_group(group).num_rows
        if some and rows + size > _MAX_AHEAD_ROWS:
            yield some
            some, rows = [], 0
        some.append(group)
        rows += size
    if some:
        yield some


def _has_kept(table: "pq.ParquetFile", names: list[str], group: int, row_filter: "RowFilter") -> bool:
    """Whether the condition is true for a row of a row group: its columns alone are read, as far as to such a row."""
    named = [name for name in names if name in row_filter.columns]
    if len(named) in (0, len(names)):
        return True
    batches = table.iter_batches(batch_size=_COLUMN_ROWS, columns=named, row_groups=[group])
    return any(len(row_filter.places(batch)) for batch in batches)


def _groups_from(metadata: "pq.FileMetaData", first: int) -> tuple[list[int], int]:
    """The row groups from the one that has row `first` on, and how many of their rows come before it."""
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    group = 0
    while group < len(sizes) and first >= sizes[group]:
        first -= sizes[group]
        group += 1
    return list(range(group, len(sizes))), first


def has_small_groups(path: str) -> bool:
    """Whether any range of rows can be read without reading many others: Parquet, in row groups that are not large."""
    if table_format(path) != "parquet":
        return False
    with open_parquet(path) as table:
        groups = range(table.metadata.num_row_groups)
        return all(table.metadata.row_group(group).num_rows <= _MAX_AHEAD_ROWS for group in groups)


def _behind(chunks: Iterable[Chunk | range], skipped: int) -> Iterator[Chunk | range]:
    for chunk in chunks:
        size = _size(chunk)
        if skipped < size:
            yield cut_chunk(chunk, skipped, size) if skipped else chunk
        skipped = max(0, skipped - size)


def _size(chunk: Chunk | range) -> int:
    return len(chunk) if isinstance(chunk, list | range) else chunk.num_rows


def cut_chunk(chunk: Chunk | range, first: int, end: int) -> Chunk | range:
    """Some of its rows."""
    return chunk[first:end] if isinstance(chunk, list | range) else chunk.slice(first, end - first)


class Cursor:
    """The rows of one table, read forward from number `first` on."""

    def __init__(self, path: str, wanted: Sequence[str], first: int, row_filter: "RowFilter | None" = None):
        self.path, self.wanted, self.at = path, tuple(wanted), first
        self.where = row_filter.text if row_filter is not None else None
        self.version = _version(path)
        self.is_ended = False
        self._chunks = read_chunks(path, wanted, first, row_filter)
        self._rest: Chunk | range = []

    def take(self, count: int | None) -> Iterator[Chunk | range]:
        """The next rows, all that are left for None."""
        while count is None or count > 0:
            chunk, self._rest = self._rest or next(self._chunks, []), []
            size = _size(chunk)
            if not size:
                self.is_ended = True
                return
            if count is not None and size > count:
                self._rest, chunk = cut_chunk(chunk, count, size), cut_chunk(chunk, 0, count)
                size = count
            self.at += size
            count = None if count is None else count - size
            yield chunk


def _version(path: str) -> tuple[int, ...] | None:
    """What changes with a local file; None for others."""
    try:
        return None if is_far(path) else version_of(Path(path.removeprefix("file://")))
    except OSError:
        return None


_kept: list[Cursor] = []
"""The last cursor of this process, for the shard that follows."""


def cursor_at(path: str, wanted: Sequence[str], first: int, row_filter: "RowFilter | None" = None) -> Cursor:
    """A cursor at row `first`: the kept one if it is not far before it, or for text anywhere before it."""
    try:
        kept = _kept.pop()
    except IndexError:
        kept = None
    most = _MAX_AHEAD_ROWS if table_format(path) == "parquet" else first
    what = (path, tuple(wanted), None if row_filter is None else row_filter.text)
    if kept is None or (kept.path, kept.wanted, kept.where) != what or not 0 <= first - kept.at <= most:
        return Cursor(path, wanted, first, row_filter)
    if kept.is_ended or kept.version != _version(path):  # rows may have been appended, or the file was changed
        return Cursor(path, wanted, first, row_filter)
    for _ in kept.take(first - kept.at):
        pass
    return kept


def keep_cursor(cursor: Cursor) -> None:
    """Keeps it for the next `cursor_at`."""
    _kept[:] = [cursor]


def parts_with_cursors(
    folder: str, parts: Iterable[InputPart], wanted: Sequence[str], row_filter: "RowFilter | None" = None
) -> Iterator[tuple[InputPart, str, Cursor]]:
    """Each part with the path of its file, and a cursor at its first row, which takes the part's rows."""
    cursor: Cursor | None = None
    for part in parts:
        path = f"{folder}/{part.path}"
        if cursor is None or (cursor.path, cursor.at) != (path, part.first):
            cursor = cursor_at(path, wanted, part.first, row_filter)
        yield part, path, cursor
    if cursor is not None:
        keep_cursor(cursor)


def _parquet_rows(path: str, wanted: Sequence[str] | None) -> Iterator[Record]:
    with open_parquet(path) as table:
        names = None if wanted is None else top_levels(wanted, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=names):
            yield from to_records(batch)
