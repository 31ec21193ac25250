"""Streams rows of URL lists: txt, csv, tsv, jsonl and parquet, one or many files, plain or compressed."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from typing import Any, cast

import fsspec

from pipeline.errors import ConfigError

FORMATS = ("txt", "csv", "tsv", "jsonl", "parquet")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BATCH_ROWS = 4096

Record = dict[str, Any]


def expand(path: str, field: str, suffixes: Sequence[str]) -> list[str]:
    """The files behind a path: a file, a folder, or a glob; local or any fsspec URL; sorted.

    Raises:
        ConfigError: nothing is there.
    """
    filesystem, plain = fsspec.core.url_to_fs(path)
    if filesystem.isdir(plain):
        found = sorted(p for p in filesystem.find(plain) if table_format(p) in suffixes)
        if not found:
            raise ConfigError(f"{field}: {path} holds no {', '.join(suffixes)} file; check the folder")
    elif any(c in plain for c in "*?["):
        found = sorted(p for p in cast(list[str], filesystem.glob(plain)) if not filesystem.isdir(p))
    else:
        found = [plain] if filesystem.exists(plain) else []
    if not found:
        raise ConfigError(f"{field}: {path} does not exist; check the path")
    return [filesystem.unstrip_protocol(p) if "://" in path else p for p in found]


def table_format(path: str) -> str:
    """The format a file name tells, such as `csv` for `a.csv.gz`; the bare suffix if unknown."""
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
        import pyarrow.parquet as pq

        with fsspec.open(path, "rb") as file:
            return pq.ParquetFile(cast(Any, file)).schema_arrow.names
    first = next(iter(read_rows(path, None)), None)
    return [] if first is None else [str(name) for name in first]


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
    with fsspec.open(path, "rb", compression="infer") as raw:
        text = TextIOWrapper(cast(Any, raw), encoding="utf-8-sig", errors="surrogateescape", newline="")
        if kind == "txt":
            yield from ({"url": line.strip()} for line in text if line.strip())
        elif kind == "jsonl":
            yield from (_json_row(line) for line in text if line.strip())
        else:
            yield from _delimited_rows(text, kind)


def _delimited_rows(text: TextIOWrapper, kind: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {"delimiter": ","}
    reader = csv.reader(text, **quoting)
    names = next(reader, [])
    for values in reader:
        if values:
            yield dict(zip(names, values, strict=False))


def _json_row(line: str) -> Record:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _parquet_rows(path: str, wanted: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(path, "rb") as file:
        try:
            table = pq.ParquetFile(cast(Any, file))
            names = None if wanted is None else [n for n in wanted if n in table.schema_arrow.names]
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=names):
                yield from batch.to_pylist()
        except pa.ArrowInvalid as error:
            raise ConfigError(f"source.path: {path} is not a readable parquet file: {error}") from error
