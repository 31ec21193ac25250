"""URL lists, downloaded with img2dataset."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.fingerprint import canonical_json
from pipeline.stage import Shard
from stages.sources.annotations import AnnotationsConfig
from stages.sources.base import Emit, InputPart, Original, SourceRow, require_path
from stages.sources.download.config import DownloadConfig
from stages.sources.download.downloader import load_downloader
from stages.sources.download.originals import download_originals
from stages.sources.files import expand, find_files
from stages.sources.records import row_text
from stages.sources.records.cells import BadCell, caption_cell, captions_of, key_of, text_of, top_level, top_levels
from stages.sources.records.parquet import to_records
from stages.sources.records.regular import Chunk
from stages.sources.records.row_text import NotColumnar, RowTexts
from stages.sources.records.types import Columns
from stages.sources.tables import (
    FORMATS,
    TYPED,
    columns,
    count_rows,
    estimate_rows,
    has_small_groups,
    json_columns,
    kept_types,
    parts_with_cursors,
    read_rows,
    table_format,
)
from stages.sources.tabular.kept_rows import row_filter
from stages.sources.tabular.table_rows import Block, Marks, TableSource, kept_of


class UrlsConfig(AnnotationsConfig):
    """A list of image URLs with captions."""

    takes_caption_sets = True

    kind: Literal["urls"] = "urls"
    path: str | None = None
    """A txt, csv, tsv, jsonl or parquet file, a folder of them, or a glob; local or any fsspec URL."""
    url_column: str = "url"
    """Column of the URL."""
    caption_column: str | None = "caption"
    """Column of the caption, or of a list of captions. null, and txt files: every caption is empty."""
    key_column: str | None = None
    """Column of a unique key, text or numbers; default: the row number."""
    download: DownloadConfig = DownloadConfig()
    """How to fetch."""

    def build(self) -> "UrlsSource":
        return UrlsSource(self)


class UrlsSource(TableSource):
    """Streams URL lists. The captions of a row are null where the list has no captions at all."""

    config: UrlsConfig
    has_cells_apart = True

    def __init__(self, config: UrlsConfig):
        self.config = config
        self.path = require_path(config.path, "urls")
        self.layout = ("key", "url", "captions", *config.annotation_layout, "is_duplicate")
        self.keys_may_repeat = config.key_column is not None
        self.row_filter = row_filter(config.where)

    @property
    def grows(self) -> bool:
        return True

    def check(self) -> None:
        files = expand(self.path, "source.path", FORMATS)
        named = ("url_column", "caption_column", "key_column")
        for file in files:
            if table_format(file) == "txt" and (self.config.keep_columns or self.config.captions):
                self.config.check_columns((), columns(file), file)
            if table_format(file) in TYPED and (present := columns(file)):
                self._check_columns(named, present, file)
        objects = [file for file in files if table_format(file) == "jsonl"]
        wanted = [column for field in named if (column := getattr(self.config, field)) is not None]
        wanted += self.config.further_columns
        wanted += () if self.row_filter is None else self.row_filter.columns
        if present := json_columns(objects, [*wanted, *self.config.annotation_names]):
            self._check_columns(named, present, objects[0] if len(objects) == 1 else self.path)
        if not any(True for file in files for _ in read_rows(file, [self.config.url_column])):
            raise ConfigError(f"source.path: {self.path} holds no rows; give a list with at least one row")
        self.config = self.config.with_types(lambda keep: kept_types(keep, files))

    def _check_columns(self, named: Sequence[str], present: Columns, where: str) -> None:
        self.config.check_columns(named, present, where)
        if self.row_filter is not None:
            self.row_filter.check(present, where)

    def parts(self) -> Iterator[InputPart]:
        self.ignored_files.clear()
        found = find_files(self.path, "source.path", FORMATS, ignored=self.ignored_files)
        return (InputPart(*file) for file in found.items())

    def count_rows(self, path: str) -> int:
        return count_rows(f"{self.folder}/{path}")

    def blocks(self, parts: Iterable[InputPart], marks: Marks, number: int = 0) -> Iterator[Block]:
        config = self.config
        wanted = [c for c in (config.key_column, config.url_column, config.caption_column) if c]
        wanted += [*config.annotation_names, *config.further_columns]
        wanted += () if self.row_filter is None else self.row_filter.columns
        for part, path, cursor in parts_with_cursors(self.folder, parts, wanted, self.row_filter):
            is_txt, near = table_format(path) == "txt", has_small_groups(path)
            first = part.first
            for chunk in cursor.take(part.rows):
                rows, (kept, places) = len(chunk), kept_of(chunk, self.row_filter)
                texts, repeats = self._texts(kept, number + places, marks, is_txt=is_txt)
                cells = {column: _cells(kept, column) for column in config.further_columns}
                where = places if len(places) < rows else None
                yield Block(part, first, number, texts, repeats, near, where, rows - len(places), cells)
                number, first = number + rows, first + rows

    def _texts(
        self, chunk: Chunk, numbers: np.ndarray, marks: Marks, *, is_txt: bool
    ) -> tuple[RowTexts, Sequence[bool] | None]:
        """Rows as a shard has them, and which of them repeat a key."""
        if not isinstance(chunk, list):
            try:
                return self._columns_texts(chunk, numbers, marks, is_txt=is_txt)
            except NotColumnar:
                chunk = to_records(chunk)
        rows = [self._row(f"{place:09d}", record, is_txt=is_txt) for place, record in zip(numbers, chunk, strict=True)]
        repeats = marks.repeats([row.key for row in rows]) if self.keys_may_repeat else [False] * len(rows)
        marked = (replace(row, is_duplicate=repeated) for row, repeated in zip(rows, repeats, strict=True))
        return RowTexts.of(row.to_json(self.layout) for row in marked), repeats

    def _columns_texts(
        self, batch: pa.RecordBatch, numbers: np.ndarray, marks: Marks, *, is_txt: bool
    ) -> tuple[RowTexts, Sequence[bool] | None]:
        """The same of columns.

        Raises:
            NotColumnar: some cell can only be judged by itself.
        """
        config, repeats, is_repeated = self.config, None, "false"
        found = numbered = row_text.numbers(numbers, 9)
        url = row_text.texts(_column(batch, "url" if is_txt else config.url_column))
        captions = ["null"]
        if config.caption_column is not None and not is_txt:
            captions = row_text.captions_json(_column(batch, config.caption_column))
        annotations = [self._annotations_json(batch), ","] if config.annotation_names else []
        if config.key_column is not None:
            keys = row_text.keys(_column(batch, config.key_column))
            found = pc.coalesce(keys, numbered)  # pyright: ignore[reportAttributeAccessIssue]
            repeats = marks.repeats(found.to_pylist())
            is_repeated = row_text.booleans(repeats)
        key, url = row_text.escape(found), row_text.escape(pc.fill_null(url, row_text.text_scalar("")))
        joined = row_text.join('["', key, '","', url, '",', *captions, ",", *annotations, is_repeated, "],")
        return RowTexts(joined), repeats

    def _annotations_json(self, batch: pa.RecordBatch) -> pa.Array:
        kept, schema = self.config.keep_columns, batch.schema.names
        if not self.config.annotation_columns and set(kept) <= set(schema):
            with suppress(NotColumnar):
                cells = [(name, kind or "text", batch.column(name)) for name, kind in kept.items()]
                return row_text.join('{"columns":', row_text.kept_json(cells), "}")
        columns = top_levels(self.config.annotation_names, batch.schema.names)
        try:
            found = [self.config.annotations(record) for record in to_records(batch.select(columns))]
        except BadCell as error:
            raise NotColumnar from error
        return row_text.text_array([canonical_json(each) for each in found])

    def _row(self, key: str, record: dict[str, Any], *, is_txt: bool) -> SourceRow:
        """The row with what its record has; where a cell cannot be used, with what came before and the drop."""
        config, url, captions = self.config, "", None
        try:
            own_key = key_of(record, config.key_column)
            key = key if own_key is None else own_key
            url = text_of(record, "url" if is_txt else config.url_column) or ""
            if config.caption_column is not None and not is_txt:
                captions = captions_of(record, config.caption_column)
            return SourceRow(key, url=url, captions=captions, annotations=config.annotations(record))
        except BadCell as bad:
            return SourceRow(key, url=url, captions=captions).dropped(bad)

    def caption_cells(self, shard: Shard, column: str) -> list[list[str] | None]:
        return shard.cells(column)

    def prepare(self) -> None:
        load_downloader()

    def estimate_rows(self) -> int | None:
        return estimate_rows(expand(self.path, "source.path", FORMATS))

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        download_originals(map(Original.of, rows), scratch, self.config.download, emit)

    def settings(self) -> object:
        return self.config.row_settings

    def fingerprint(self) -> dict[str, object]:
        config = self.config
        columns = {"url_column": config.url_column, "caption_column": config.caption_column}
        return {**columns, **config.annotation_settings}


def _cells(chunk: Chunk, column: str) -> RowTexts:
    """The captions of each row in a further column, as JSON."""
    if not isinstance(chunk, list):
        with suppress(NotColumnar):
            return RowTexts(row_text.join(*row_text.captions_json(_column(chunk, column)), ","))
    return RowTexts.of(caption_cell(record, column) for record in to_records(chunk))


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """
    Raises:
        NotColumnar: it is a path into nested columns.
    """
    if name in batch.schema.names:
        return batch.column(name)
    if "." in name and top_level(name, dict.fromkeys(batch.schema.names)) is not None:
        raise NotColumnar
    return pa.nulls(batch.num_rows)
