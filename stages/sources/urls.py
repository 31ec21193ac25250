"""URL lists, downloaded with img2dataset."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.sources.annotations import AnnotationsConfig
from stages.sources.base import Emit, InputPart, Original, Source, SourceRow, require_path
from stages.sources.download.config import DownloadConfig
from stages.sources.download.downloader import load_downloader
from stages.sources.download.originals import download_originals
from stages.sources.files import base_folder, expand, find_files
from stages.sources.records.cells import BadCell, captions_of, key_of, text_of
from stages.sources.tables import (
    FORMATS,
    TYPED,
    columns,
    count_rows,
    estimate_rows,
    json_columns,
    read_parts,
    read_rows,
    table_format,
)


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
    """Column of a unique key, text or numbers; default: the row number."""
    download: DownloadConfig = DownloadConfig()
    """How to fetch."""

    def build(self) -> "UrlsSource":
        return UrlsSource(self)


class UrlsSource(Source):
    """Streams URL lists. The captions of a row are null where the list has no captions at all."""

    def __init__(self, config: UrlsConfig):
        self.config = config
        self.path = require_path(config.path, "urls")
        self.layout = ("key", "url", "captions", *config.annotation_layout, "is_duplicate")
        self.keys_may_repeat = config.key_column is not None

    @property
    def grows(self) -> bool:
        return True

    def check(self) -> None:
        files = expand(self.path, "source.path", FORMATS)
        named = ("url_column", "caption_column", "key_column")
        for file in files:
            if table_format(file) in TYPED and (present := columns(file)):
                self.config.check_columns(named, present, file)
        objects = [file for file in files if table_format(file) == "jsonl"]
        wanted = [column for field in named if (column := getattr(self.config, field)) is not None]
        if present := json_columns(objects, [*wanted, *self.config.annotation_columns.values()]):
            self.config.check_columns(named, present, objects[0] if len(objects) == 1 else self.path)
        if not any(True for file in files for _ in read_rows(file, [self.config.url_column])):
            raise ConfigError(f"source.path: {self.path} holds no rows; give a list with at least one row")

    def parts(self) -> Iterator[InputPart]:
        self.ignored_files.clear()
        found = find_files(self.path, "source.path", FORMATS, ignored=self.ignored_files)
        return (InputPart(*file) for file in found.items())

    def count_rows(self, path: str) -> int:
        return count_rows(f"{base_folder(self.path)}/{path}")

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        config = self.config
        wanted = [c for c in (config.key_column, config.url_column, config.caption_column) if c]
        wanted += config.annotation_columns.values()
        for number, (part, record) in enumerate(read_parts(base_folder(self.path), parts, wanted)):
            yield part, self._row(f"{number:09d}", record, is_txt=table_format(part.path) == "txt")

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

    def prepare(self) -> None:
        load_downloader()

    def estimate_rows(self) -> int | None:
        return estimate_rows(expand(self.path, "source.path", FORMATS))

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        download_originals(map(Original.of, rows), scratch, self.config.download, emit)

    def fingerprint(self) -> dict[str, object]:
        config = self.config
        return {"url_column": config.url_column, "caption_column": config.caption_column, **config.annotation_settings}
