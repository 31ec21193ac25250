"""URL lists, downloaded with img2dataset."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.captions import clean_captions
from stages.sources.annotations import ANNOTATION_COLUMNS, Annotations, AnnotationsConfig
from stages.sources.base import Emit, InputPart, Original, Row, Source, mark_duplicates, require_path
from stages.sources.download.config import DownloadConfig
from stages.sources.download.downloader import download, load_downloader
from stages.sources.download.open_url import Endpoint
from stages.sources.files import base_folder, expand, find_files
from stages.sources.tables import (
    FORMATS,
    Record,
    columns,
    count_rows,
    estimate_rows,
    read_parts,
    read_rows,
    table_format,
)

UrlRow = tuple[str, str, list[str] | None, bool] | tuple[str, str, list[str] | None, Annotations, bool]
"""key, url, captions (null where the list has none at all: then the caption is empty), the writing in the image if
it is asked for, is_duplicate."""


class UrlsConfig(AnnotationsConfig):
    """A list of image URLs with captions."""

    kind: Literal["urls"] = "urls"
    path: str | None = None
    """A txt, csv, tsv, jsonl or parquet file, a folder of them, or a glob; local or any fsspec URL."""
    url_column: str = "url"
    """Column of the URL."""
    caption_column: str | None = "caption"
    """Column of the caption, or of a list of captions. null, and txt files: every caption is empty."""
    key_column: str | None = None
    """Column of a unique key; default: the row number."""
    download: DownloadConfig = DownloadConfig()
    """How to fetch."""

    def build(self) -> "UrlsSource":
        return UrlsSource(self)


class UrlsSource(Source):
    """Streams URL lists; a row is [key, url, captions, is_duplicate]."""

    def __init__(self, config: UrlsConfig):
        self.config = config
        self.path = require_path(config.path, "urls")

    def check(self) -> None:
        files = expand(self.path, "source.path", FORMATS)
        for name in ("url_column", "caption_column", "key_column", *ANNOTATION_COLUMNS):
            column = getattr(self.config, name)
            if column is None or table_format(files[0]) == "txt":
                continue
            present = columns(files[0])
            if not present:
                raise ConfigError(f"source.path: {files[0]} is empty; give a list with at least one row")
            if column not in present:
                raise ConfigError(f"source.{name}: {files[0]} has no column {column!r}; it has: {', '.join(present)}")
        if not any(True for file in files for _ in read_rows(file, [self.config.url_column])):
            raise ConfigError(f"source.path: {self.path} holds no rows; give a list with at least one row")

    @property
    def grows(self) -> bool:
        return True

    def parts(self) -> Iterator[InputPart]:
        return (InputPart(*found) for found in find_files(self.path, "source.path", FORMATS).items())

    def count_rows(self, path: str) -> int:
        return count_rows(f"{base_folder(self.path)}/{path}")

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, Row]]:
        rows = self._rows(parts)
        if self.config.key_column is None:
            return ((part, [*row, False]) for part, row in rows)
        return mark_duplicates(rows)

    def _rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, Row]]:
        config = self.config
        wanted = [c for c in (config.key_column, config.url_column, config.caption_column) if c]
        wanted += config.annotation_columns.values()
        for number, (part, record) in enumerate(read_parts(base_folder(self.path), parts, wanted)):
            key = record.get(config.key_column) if config.key_column else None
            uncaptioned = config.caption_column is None or table_format(part.path) == "txt"
            yield (
                part,
                [
                    f"{number:09d}" if key is None else str(key),
                    str(record.get(config.url_column) or ""),
                    None if uncaptioned else captions_of(record, config.caption_column),
                    *config.row_end(record),
                ],
            )

    def prepare(self) -> None:
        load_downloader()

    def captions(self, shard: Shard) -> list[tuple[str, ...]]:
        return row_captions(cast(Sequence[UrlRow], shard.rows))

    def estimate_rows(self) -> int | None:
        return estimate_rows(expand(self.path, "source.path", FORMATS))

    def fetch(self, shard: Shard, wanted: frozenset[str] | None, scratch: Path, emit: Emit) -> None:
        rows = cast(Sequence[UrlRow], shard.rows)
        fetch_rows(rows, wanted, scratch, self.config.download, emit)

    def fingerprint(self) -> dict[str, object]:
        config = self.config
        return {"url_column": config.url_column, "caption_column": config.caption_column, **config.annotation_settings}


def captions_of(record: Record, column: str | None) -> list[str]:
    """The captions of a row: the column may hold a text, a list of texts, or nothing."""
    value = record.get(column) if column else None
    values = value if isinstance(value, list) else [value]
    return [v if isinstance(v, str) else str(v) for v in values if v is not None]


def row_captions(rows: Sequence[UrlRow]) -> list[tuple[str, ...]]:
    """The cleaned captions of each row; a URL list has them without a download."""
    return [clean_captions(row[2] or (), allow_empty=row[2] is None)[0] for row in rows]


def fetch_rows(
    rows: Sequence[UrlRow],
    wanted: frozenset[str] | None,
    scratch: Path,
    config: DownloadConfig,
    emit: Emit,
    *,
    address: Mapping[str, str] | None = None,
    own: Endpoint | None = None,
) -> None:
    """Downloads rows; those that will be dropped anyway are not fetched.

    Args:
        address: where to fetch a URL from, if not from itself.
        own: an address of this program itself, allowed though it be private.
    """
    urls: dict[int, str] = {}
    originals: dict[int, Original] = {}
    for row, (key, url, raw_captions, *annotations, is_duplicate) in enumerate(rows):
        if wanted is not None and key not in wanted:
            continue
        captions, reason = clean_captions(raw_captions or (), allow_empty=raw_captions is None)
        if is_duplicate:
            reason = "duplicate_key"
        if reason is not None:
            emit(Original(row, key, url, captions, None, reason))
            continue
        originals[row] = Original(row, key, url, captions, annotations=annotations[0] if annotations else {})
        urls[row] = address[url] if address is not None else url

    def result(row: int, data: bytes | None, reason: str | None, detail: str) -> None:
        emit(replace(originals[row], data=data, reason=reason, detail=detail))

    if urls:
        download(urls, scratch, config, result, own=own)
