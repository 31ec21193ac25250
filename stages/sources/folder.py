"""A folder of images with captions: `NAME.txt` next to `NAME.png`, or tables of captions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.lines import split_lines
from stages.sources.annotations import AnnotationsConfig
from stages.sources.arrays.folders import no_array
from stages.sources.base import (
    MAX_FILE_BYTES,
    Emit,
    InputPart,
    KeyRegistry,
    Original,
    PrecomputedEmbedding,
    Source,
    SourceRow,
    require_path,
)
from stages.sources.caches.reader import CacheReader
from stages.sources.caches.registry import AnyCache
from stages.sources.files import READABLE
from stages.sources.ignored import ignored_by_name, suffix_rule
from stages.sources.records.cells import BadCell, captions_of, text_of
from stages.sources.tables import columns, count_rows, estimate_rows, kept_types, read_parts
from stages.sources.tabular.kept_rows import marked, row_filter
from stages.sources.tree import Content, Sizes, Tree, places

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
_ANY_IMAGE = IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES
_SPELLED = sorted({spelled for suffix in _ANY_IMAGE for spelled in (suffix, suffix.upper())})
_CAPTIONS_AT_ONCE = 256
_TABLES = tuple(f"captions.{suffix}" for suffix in ("tsv", "csv", "jsonl", "parquet"))
_METADATA = tuple(f"metadata.{suffix}" for suffix in ("jsonl", "csv", "parquet"))
_MOST_SPLITS = 64
_CAPTION_SUFFIXES = (".txt", ".caption")
_CAPTION = "caption"
_ORPHAN = "caption files without an image"
_UNNAMED = "images that no row of the table names"


class FolderConfig(AnnotationsConfig):
    """A folder of images."""

    kind: Literal["folder"] = "folder"
    path: str | None = None
    """The folder, local or any fsspec URL. With a captions.tsv|csv|jsonl|parquet in it, its rows are the samples; or
    with a metadata.jsonl|csv|parquet in it or in its subfolders (the first 64), as Hugging Face's imagefolder has it.
    Without, all images below the folder, each with the captions of NAME.txt or NAME.caption next to it (one per
    line)."""
    file_column: str = "file"
    """Column of the image's path in the captions table, relative to the folder or its `images/`. In a metadata table
    also `file_name`, relative to the folder of the table."""
    caption_column: str | None = "caption"
    """Column of the caption, or of a list of captions, in the captions table; in a metadata table also `text`. null:
    every caption is empty, also without a table."""
    use_tables: bool = True
    """false: the captions are in files next to the images, though there are tables."""
    arrays: dict[str, AnyCache] = Field(default_factory=dict)
    """Embeddings of the captions in text caches of other trainers, by a name that encoders of kind `given` request."""

    def build(self) -> "FolderSource":
        return FolderSource(self)


class FolderSource(Source):
    """The key of a row is the image's path; its payload is the size of the file, -1 if there is none.

    A part is the table, or without one an image.
    """

    keys_may_repeat = True
    has_images_at_hand = True

    def __init__(self, config: FolderConfig):
        self.config = config
        self.path = require_path(config.path, "folder")
        self.row_filter = row_filter(config.where)
        self.layout = ("key", "captions", "payload", *config.annotation_layout, "is_duplicate")
        self.caches = {name: CacheReader(name, cache, self.path) for name, cache in config.arrays.items()}

    @cached_property
    def tree(self) -> Tree:
        return Tree(self.path)

    @cached_property
    def tables(self) -> dict[str, tuple[str, str | None]]:
        """The tables, each with its columns of files and captions, the latter None if they are not wanted."""
        config = self.config
        if not config.use_tables:
            return {}
        found = next((name for name in _TABLES if self.tree.size(name) is not None), None)
        if found is not None:
            return {found: (config.file_column, config.caption_column)}
        if (place := next(self._metadata(""), None)) is not None:
            return dict([place])
        folders = [name for name in self.tree.folders() if ignored_by_name(name) is None]
        places = (next(self._metadata(f"{name}/"), None) for name in folders[:_MOST_SPLITS])
        return dict(place for place in places if place is not None)

    def _metadata(self, folder: str) -> Iterator[tuple[str, tuple[str, str | None]]]:
        """The metadata tables of a folder that name files."""
        for name in (f"{folder}{table}" for table in _METADATA if self.tree.size(f"{folder}{table}") is not None):
            named = (self.config.file_column, "file_name"), (self.config.caption_column, "text")
            present = columns(f"{self.tree.url}/{name}", [choices[0] for choices in named if choices[0] is not None])
            file, caption = (next((c for c in choices if c in present), choices[0]) for choices in named)
            if file in present:
                yield name, (str(file), None if self.config.caption_column is None else caption)

    @property
    def _read_columns(self) -> list[str]:
        """What is read of the tables besides files and captions."""
        return [*self.config.annotation_names, *(self.row_filter.columns if self.row_filter else ())]

    @property
    def grows(self) -> bool:
        return bool(self.tables)

    def check(self) -> None:
        if not self.tree.is_folder():
            raise ConfigError(f"source.path: {self.tree.url} is not a folder; check the path")
        where = self.tree.url
        for name, (file, caption) in self.tables.items():
            where = f"{self.tree.url}/{name}"
            wanted = [c for c in (file, caption, *self._read_columns) if c is not None]
            if present := columns(where, wanted):
                if self.row_filter is not None:
                    self.row_filter.check(present, where)
                named = self.config.model_copy(update={"file_column": file, "caption_column": caption})
                named.check_columns(("file_column", "caption_column"), present, where)
        if not self.tables:
            named = {f"{field}_column": column for field, column in self.config.annotation_columns.items()}
            if self.config.where is not None:
                raise ConfigError(
                    f"source.where: is a condition on a table of captions, and {where} has none; add one "
                    f"({', '.join(_TABLES)}), or leave it out"
                )
            for field, column in (*named.items(), *(("keep_columns", column) for column in self.config.keep_columns)):
                raise ConfigError(
                    f"source.{field}: {column!r} is a column of a captions table, and {where} has none; "
                    f"add one ({', '.join(_TABLES)})"
                )
        found = read_parts(self.tree.url, self.parts(), []) if self.tables else self.parts()
        if not any(True for _ in found):
            raise ConfigError(f"source.path: {where} holds no images; give a folder with at least one")
        files = [f"{self.tree.url}/{name}" for name in self.tables]
        self.config = self.config.with_types(lambda keep: kept_types(keep, files))
        for cache in self.caches.values():
            cache.check(self._images())

    def _images(self) -> Iterator[str]:
        """The paths of the images that exist; without tables, captions are not read for that."""
        if self.tables:
            return (row.key for _, row in self.rows(self.parts()) if row.drop is None and row.payload[0] >= 0)
        return (part.path for part in self.parts())

    def parts(self) -> Iterator[InputPart]:
        if self.tables:
            yield from (InputPart(name, self.tree.size(name)) for name in self.tables)
            return
        self.ignored_files.clear()
        for name, size, siblings in self.tree.walk_with_siblings():
            rule = ignored_by_name(name) or _ignored_by_suffix(name, siblings, self.ignored_files)
            if rule is None:
                yield InputPart(name, size)
            elif rule != _CAPTION:
                self.ignored_files[rule] += 1

    def count_rows(self, path: str) -> int:
        return count_rows(f"{self.tree.url}/{path}")

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        return self._table_rows(parts) if self.tables else self._loose_rows(parts)

    def _table_rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        named = KeyRegistry()
        wanted = {column for both in self.tables.values() for column in both if column is not None}
        wanted |= set(self._read_columns)
        images = 0
        with self.tree.sizes() as size_of, closing(named):
            records = read_parts(self.tree.url, parts, sorted(wanted))
            for (part, record), is_kept in marked(records, lambda each: each[1], self.row_filter):
                row, place = self._row(part, record, size_of)
                images += bool(place) and is_image(place) and named.is_new(place)
                self.filtered += not is_kept
                if is_kept:
                    yield part, row
        self._count_unnamed(images)

    def _row(self, part: InputPart, record: Mapping[str, Any], size_of: Sizes) -> tuple[SourceRow, str]:
        """The row of a record, and the file that it names; "" if there is none."""
        config = self.config
        file_column, caption_column = self.tables.get(part.path, (config.file_column, config.caption_column))
        folder = part.path.rpartition("/")[0]
        name, place, payload, captions = "", "", (-1,), None
        try:
            name = text_of(record, file_column) or ""
            name = f"{folder}/{name}" if folder and name else name
            found = ((place, size) for place in places(name) if (size := size_of(place)) is not None)
            place, size = next(found, ("", -1))
            payload = (size,)
            captions = None if caption_column is None else captions_of(record, caption_column)
            annotations = config.annotations(record)
        except BadCell as bad:
            return SourceRow(name, captions=captions, payload=payload).dropped(bad), place
        return SourceRow(name, captions=captions, payload=payload, annotations=annotations), place

    def _count_unnamed(self, named: int) -> None:
        """Counts the files that no row of the tables names, of which `named` are images."""
        ignored = self.ignored_members
        ignored.clear()
        for name, _, siblings in self.tree.walk_with_siblings():
            rule = ignored_by_name(name) or _ignored_by_suffix(name, siblings, ignored) or _UNNAMED
            if name not in self.tables and rule != _CAPTION:
                ignored[rule] += 1
        ignored[_UNNAMED] = max(0, ignored[_UNNAMED] - named)

    def _loose_rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        parts = iter(parts)
        while some := list(islice(parts, _CAPTIONS_AT_ONCE)):
            texts = self.tree.read(_caption_files(part.path) for part in some)
            for part, text in zip(some, texts, strict=True):
                if isinstance(text, PermissionError):
                    raise ConfigError(
                        f"source.path: the captions of {part.path} cannot be read: {text.strerror or text}; {READABLE}"
                    ) from text
                captions = None if self.config.caption_column is None else _lines(text)
                yield part, SourceRow(part.path, captions=captions, payload=(part.bytes,))

    def estimate_rows(self) -> int | None:
        return estimate_rows([f"{self.tree.url}/{name}" for name in self.tables]) if self.tables else None

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        del shard, scratch
        for row in rows:
            if row.payload[0] > MAX_FILE_BYTES:
                detail = f"{row.payload[0]:,} bytes, over {MAX_FILE_BYTES:,}"
                emit(replace(Original.of(row), reason="too_large", detail=detail))
        rows = [row for row in rows if row.payload[0] <= MAX_FILE_BYTES]
        for row, content in zip(rows, self.tree.read(places(row.key) for row in rows), strict=True):
            emit(self._original(row, content))

    def _original(self, row: SourceRow, content: Content) -> Original:
        if not places(row.key):
            return Original.dropped(row, "unsafe_path", "must stay inside the folder")
        if isinstance(content, FileNotFoundError):
            return Original.dropped(row, "missing_file", f"not found below {PurePosixPath(self.tree.url).name}/")
        original = Original.of(row)
        if isinstance(content, OSError):
            return replace(original, reason="unreadable_file", detail=content.strerror or "")
        return replace(original, data=content)

    def describe_array(self, name: str) -> dict[str, object]:
        if name not in self.caches:
            raise no_array(name, self.caches)
        return self.caches[name].config.describe()

    def precomputed(self, shard: Shard, name: str, positions: Sequence[int]) -> Iterator[PrecomputedEmbedding]:
        rows = self.rows_of(shard)
        return self.caches[name].read(rows[position] for position in positions)

    def fingerprint(self) -> dict[str, object]:
        suffixes = sorted({name.rpartition("/")[2].removeprefix("captions") for name in self.tables})
        captions = " ".join(suffixes) if suffixes else ".txt beside each image"
        return {"captions": captions, **self.config.annotation_settings}


def is_image(name: str) -> bool:
    """True if the suffix is one of an image, whether or not its format is decoded."""
    return PurePosixPath(name).suffix.lower() in _ANY_IMAGE


def _ignored_by_suffix(name: str, siblings: Set[str], ignored: Mapping[str, int]) -> str | None:
    """The rule by which a file is not an image, None for an image; `siblings` are the names in its folder."""
    if is_image(name):
        return None
    path = PurePosixPath(name)
    if path.suffix.lower() not in _CAPTION_SUFFIXES:
        return suffix_rule(name, ignored)
    has_image = any(f"{path.stem}{suffix}" in siblings for suffix in _SPELLED)
    return _CAPTION if has_image else _ORPHAN


def _caption_files(image: str) -> list[str]:
    return [PurePosixPath(image).with_suffix(suffix).as_posix() for suffix in _CAPTION_SUFFIXES]


def _lines(text: Content) -> list[str]:
    """Captions of a text file, one per line; empty if there is no such file."""
    if isinstance(text, FileNotFoundError):
        return []
    if isinstance(text, OSError):
        raise text
    return split_lines(text)
