"""Streams the records of tables: txt, csv, tsv, jsonl and parquet, one or many files, plain or compressed."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from pipeline.errors import ConfigError
from stages.lines import stream_lines
from stages.sources.base import InputPart
from stages.sources.records.cells import InvalidLine, top_level, top_levels
from stages.sources.records.compressed import DAMAGED, SUFFIXES, open_whole
from stages.sources.records.far import open_file
from stages.sources.records.parquet import open_parquet, to_records
from stages.sources.records.text import Record, csv_records, json_records, tsv_records
from stages.sources.records.types import Columns

FORMATS = ("txt", "csv", "tsv", "jsonl", "parquet")
TYPED = ("csv", "tsv", "parquet")
"""Formats whose head names all columns."""
_BATCH_ROWS = 4096
_HEAD_BYTES = 2**16
_TEXTS = {"csv": csv_records, "tsv": tsv_records, "jsonl": json_records}


def table_format(path: str) -> str:
    """The format that a file name says, such as `csv` for `a.csv.gz`; the bare suffix if unknown."""
    name = path.lower()
    for compression in SUFFIXES:
        name = name.removesuffix(compression)
    return name.rpartition(".")[2].replace("ndjson", "jsonl").replace("pq", "parquet")


def columns(path: str, wanted: Iterable[str] = ()) -> Columns:
    """Columns of a table: names in the first line, Parquet's schema, or the keys of all JSON objects.

    Args:
        wanted: columns, or paths into nested ones; JSON is read only as far as until all were seen.

    Raises:
        ConfigError: no line can be parsed.
    """
    kind = table_format(path)
    if kind == "txt":
        return {"url": None}
    if kind == "parquet":
        with open_parquet(path) as table:
            return {field.name: field.type for field in table.schema_arrow}
    return json_columns([path], wanted) if kind == "jsonl" else _keys(islice(_parsed([path]), 1), ())


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
    return sum(1 for _ in read_rows(path, []))


def read_parts(folder: str, parts: Iterable[InputPart], wanted: Sequence[str]) -> Iterator[tuple[InputPart, Record]]:
    """Streams the records of parts of tables in `folder`. Reads on where a part follows the previous one."""
    path, place = "", 0
    records: Iterator[Record] = iter(())
    for part in parts:
        if (part.path, part.first) != (path, place):
            path, place = part.path, part.first
            records = islice(read_rows(f"{folder}/{path}", wanted), place, None)
        for record in islice(records, part.rows):
            yield part, record
            place += 1


def _parquet_rows(path: str, wanted: Sequence[str] | None) -> Iterator[Record]:
    with open_parquet(path) as table:
        names = None if wanted is None else top_levels(wanted, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=names):
            yield from to_records(batch)
