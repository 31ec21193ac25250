"""Streams the records of tables: txt, csv, tsv, jsonl and parquet, one or many files, plain or compressed."""

import csv
import json
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import fsspec

from pipeline.errors import ConfigError
from stages.sources.base import InputPart

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMATS = ("txt", "csv", "tsv", "jsonl", "parquet")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BATCH_ROWS = 4096
_HEAD_BYTES = 2**16

Record = dict[str, Any]


def table_format(path: str) -> str:
    """The format that a file name says, such as `csv` for `a.csv.gz`; the bare suffix if unknown."""
    name = path.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return name.rpartition(".")[2].replace("ndjson", "jsonl").replace("pq", "parquet")


def columns(path: str) -> list[str]:
    """Names of the columns of a table, from its head."""
    kind = table_format(path)
    if kind == "txt":
        return ["url"]
    if kind == "parquet":
        with open_parquet(path) as table:
            return table.schema_arrow.names
    first = next(iter(read_rows(path, None)), None)
    return [] if first is None else [str(name) for name in first]


def estimate_rows(files: Sequence[str]) -> int | None:
    """About how many rows the files have: exact for parquet; else from the size of the first rows.

    None for compressed text, whose size says little.
    """
    total = 0.0
    for path in files:
        if table_format(path) == "parquet":
            with open_parquet(path) as table:
                total += table.metadata.num_rows
        elif path.lower().endswith(_COMPRESSIONS):
            return None
        else:
            with fsspec.open(path, "rb") as raw:
                file = cast(Any, raw)
                head = file.read(_HEAD_BYTES)
                size = file.seek(0, 2)
            total += size / len(head) * max(1, head.count(b"\n")) if head else 0
    return round(total)


def read_rows(path: str, wanted: Sequence[str] | None) -> Iterator[Record]:
    """Streams the rows of one file as dicts; bytes that are not UTF-8 become surrogate escapes.

    TSV has no quoting: quotes are literal, as in the IANA registration. A line that cannot be parsed
    yields `{}`.

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
        with fsspec.open(path, "rb", compression="infer") as raw:
            text = TextIOWrapper(cast(Any, raw), encoding="utf-8-sig", errors="surrogateescape", newline="")
            if kind == "txt":
                yield from ({"url": line.strip()} for line in text if line.strip())
            elif kind == "jsonl":
                yield from (_json_row(line) for line in text if line.strip())
            else:
                yield from _delimited_rows(text, kind)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"source.path: {path} cannot be read to its end: {error}; write the file again") from error


def captions_of(record: Record, column: str | None) -> list[str]:
    """The captions in a record: the column may hold a text, a list of texts, or nothing."""
    value = record.get(column) if column else None
    values = value if isinstance(value, list) else [value]
    return [v if isinstance(v, str) else str(v) for v in values if v is not None]


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


def _delimited_rows(text: TextIOWrapper, kind: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    is_tsv = kind == "tsv"
    quoting = csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL
    reader = csv.reader(text, delimiter="\t" if is_tsv else ",", quoting=quoting)
    names = next(reader, [])
    for values in reader:
        if values:
            yield dict(zip(names, values, strict=False))


def _json_row(line: str) -> Record:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _parquet_rows(path: str, wanted: Sequence[str] | None) -> Iterator[Record]:
    with open_parquet(path) as table:
        names = None if wanted is None else [n for n in wanted if n in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=names):
            yield from to_records(batch)


def to_records(batch: "pa.RecordBatch | pa.Table") -> list[Record]:
    """Rows as dicts; text that is not UTF-8, though the schema says it is, becomes surrogate escapes."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = [_lossless(batch.column(name)) for name in batch.column_names]
        return [dict(zip(batch.column_names, values, strict=True)) for values in zip(*columns, strict=True)]


def _lossless(column: "pa.Array | pa.ChunkedArray") -> list[Any]:
    import pyarrow as pa

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        raw = column.cast(pa.list_(pa.binary()) if is_list else pa.binary())
        return [_decoded(value) for value in raw.to_pylist()]


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


@contextmanager
def open_parquet(path: str) -> "Iterator[pq.ParquetFile]":
    """An open parquet file.

    Raises:
        ConfigError: it is not one, or is damaged where it was read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fsspec.open(path, "rb") as file:
            yield pq.ParquetFile(cast(Any, file))
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"source.path: {path} is not a readable parquet file: {error}") from error
