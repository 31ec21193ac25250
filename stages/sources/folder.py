"""A folder of images with captions: `NAME.txt` next to `NAME.png`, or a captions table."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal

from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.sources.annotations import AnnotationsConfig
from stages.sources.base import Emit, InputPart, Original, Source, SourceRow, require_path
from stages.sources.tables import captions_of, columns, count_rows, estimate_rows, read_parts
from stages.sources.tree import Content, Tree

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
        *(".avif", ".avifs", ".ppm", ".pgm", ".pbm", ".pnm", ".mpo"),
    )
)
"""Suffixes of the formats that are decoded."""
OTHER_IMAGE_SUFFIXES = frozenset(
    (
        *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".jxr", ".tga", ".ico", ".psd", ".svg"),
        *(".exr", ".hdr", ".pfm", ".dds", ".pcx", ".sgi", ".xbm", ".xpm", ".qoi", ".dng", ".cr2", ".nef", ".arw"),
    )
)
"""Suffixes of images that are not decoded, unless they hold one of those formats: their rows are counted drops."""
_CAPTIONS_AT_ONCE = 256
_TABLES = tuple(f"captions.{suffix}" for suffix in ("tsv", "csv", "jsonl", "parquet"))


class FolderConfig(AnnotationsConfig):
    """A folder of images."""

    kind: Literal["folder"] = "folder"
    path: str | None = None
    """The folder, local or any fsspec URL. With a captions.tsv|csv|jsonl|parquet in it, its rows are the samples;
    without, all images below the folder, each with the captions of NAME.txt next to it (one per line)."""
    file_column: str = "file"
    """Column of the image's path in the captions table, relative to the folder or its `images/`."""
    caption_column: str = "caption"
    """Column of the caption, or of a list of captions, in the captions table."""

    def build(self) -> "FolderSource":
        return FolderSource(self)


class FolderSource(Source):
    """The key of a row is the image's path; its payload is the size of the file, -1 if there is none.

    A part is the table, or without one an image.
    """

    keys_may_repeat = True

    def __init__(self, config: FolderConfig):
        self.config = config
        self.path = require_path(config.path, "folder")
        self.layout = ("key", "captions", "payload", *config.annotation_layout, "is_duplicate")

    @cached_property
    def tree(self) -> Tree:
        return Tree(self.path)

    @cached_property
    def table(self) -> str | None:
        """Name of the captions table."""
        return next((name for name in _TABLES if self.tree.size(name) is not None), None)

    @property
    def grows(self) -> bool:
        return self.table is not None

    def check(self) -> None:
        if not self.tree.is_folder():
            raise ConfigError(f"source.path: {self.tree.url} is not a folder; check the path")
        where = f"{self.tree.url}/{self.table}" if self.table else self.tree.url
        if self.table is not None:
            if present := columns(where):
                self.config.check_columns(("file_column", "caption_column"), present, where)
            parts: Iterable[object] = read_parts(self.tree.url, self.parts(), [])
        else:
            for field, column in self.config.annotation_columns.items():
                raise ConfigError(
                    f"source.{field}_column: {column!r} is a column of a captions table, and {where} has none; "
                    f"add one ({', '.join(_TABLES)})"
                )
            parts = self.parts()
        if not any(True for _ in parts):
            raise ConfigError(f"source.path: {where} holds no images; give a folder with at least one")

    def parts(self) -> Iterator[InputPart]:
        if self.table is not None:
            yield InputPart(self.table, self.tree.size(self.table))
            return
        for name, size in self.tree.walk():
            if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                yield InputPart(name, size)

    def count_rows(self, path: str) -> int:
        return count_rows(f"{self.tree.url}/{path}")

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        return self._loose_rows(parts) if self.table is None else self._table_rows(parts)

    def _table_rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        config = self.config
        with self.tree.sizes() as size_of:
            wanted = [config.file_column, config.caption_column, *config.annotation_columns.values()]
            for part, record in read_parts(self.tree.url, parts, wanted):
                name = str(record.get(config.file_column) or "")
                sizes = (size_of(place) for place in _places(name))
                size = next((size for size in sizes if size is not None), -1)
                captions = captions_of(record, config.caption_column)
                yield part, SourceRow(name, captions=captions, payload=(size,), annotations=config.annotations(record))

    def _loose_rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        parts = iter(parts)
        while some := list(islice(parts, _CAPTIONS_AT_ONCE)):
            texts = self.tree.read([PurePosixPath(part.path).with_suffix(".txt").as_posix()] for part in some)
            for part, text in zip(some, texts, strict=True):
                yield part, SourceRow(part.path, captions=_lines(text), payload=(part.bytes,))

    def estimate_rows(self) -> int | None:
        return estimate_rows([f"{self.tree.url}/{self.table}"]) if self.table else None

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        del shard, scratch
        for row, content in zip(rows, self.tree.read(_places(row.key) for row in rows), strict=True):
            emit(self._original(row, content))

    def _original(self, row: SourceRow, content: Content) -> Original:
        if not _places(row.key):
            return Original.dropped(row, "unsafe_path", "must stay inside the folder")
        if isinstance(content, FileNotFoundError):
            return Original.dropped(row, "missing_file", f"not found below {PurePosixPath(self.tree.url).name}/")
        original = Original.of(row)
        if isinstance(content, OSError):
            return replace(original, reason="unreadable_file", detail=content.strerror or "")
        return replace(original, data=content)

    def fingerprint(self) -> dict[str, object]:
        suffix = PurePosixPath(self.table).suffix if self.table else ".txt beside each image"
        return {"captions": suffix, **self.config.annotation_settings}


def _places(name: str) -> tuple[str, ...]:
    """Where an image of this name may be; empty if that would be outside the folder."""
    path = PurePosixPath(name)
    inside = bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts
    return (name, f"images/{name}") if inside else ()


def _lines(text: Content) -> list[str]:
    """Captions of a text file, one per line; empty if there is no such file."""
    if isinstance(text, FileNotFoundError):
        return []
    if isinstance(text, OSError):
        raise text
    return text.decode("utf-8-sig", "surrogateescape").splitlines()
