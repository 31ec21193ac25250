"""Parquet files with the images' bytes in a column."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.fingerprint import canonical_json
from pipeline.stage import Shard
from stages.images.exif_text import exif_settings, orientation_in
from stages.sources.annotations import AnnotationsConfig
from stages.sources.arrays.folders import ArrayFolder, FolderArrayConfig, no_array
from stages.sources.base import (
    Emit,
    InputPart,
    Original,
    PrecomputedEmbedding,
    SourceRow,
    require_path,
)
from stages.sources.files import expand, find_files, named_parts, path_of
from stages.sources.records import row_text
from stages.sources.records.cells import BadCell, caption_cell, captions_of, image_of, key_of, text_of
from stages.sources.records.far import open_file
from stages.sources.records.image_files import read_image_file
from stages.sources.records.parquet import ParquetRows, to_records
from stages.sources.records.regular import Chunk
from stages.sources.records.row_text import NotColumnar, RowTexts
from stages.sources.tables import columns, count_rows, cursor_at, estimate_rows, keep_cursor, kept_types
from stages.sources.tabular.kept_rows import row_filter
from stages.sources.tabular.table_rows import Block, Marks, TableSource, kept_of

_ROWS = 2**14
"""In a block."""


class ParquetConfig(AnnotationsConfig):
    """Parquet files with image bytes."""

    takes_caption_sets = True

    kind: Literal["parquet"] = "parquet"
    path: str | None = None
    """A parquet file, a folder of them, or a glob; local or any fsspec URL."""
    image_column: str | None = "image"
    """Column of the encoded image: binary, base64, a list of the values of the bytes, or a struct with the fields
    `bytes` and `path` as datasets write it. null: there are no images, only captions and what `arrays` has."""
    image_folder: str | None = None
    """Folder of the files that `path` in image_column names where there are no bytes; default: the folder of the
    table. A file outside of it is never read."""
    caption_column: str | None = "caption"
    """Column of the caption, or of a list of captions, or a path into nested columns such as `sentences.raw`. null:
    every caption is empty."""
    url_column: str | None = None
    """Column of the image's URL, kept for lineage."""
    key_column: str | None = None
    """Column of a unique key, text or numbers; default: file name and row number."""
    exif_column: str | None = "exif"
    """Column of the EXIF as img2dataset keeps it, JSON with `Image Orientation`: it turns images that have no
    orientation of their own. The column need not be there. null: it is not used."""
    arrays: dict[str, FolderArrayConfig] = Field(default_factory=dict)
    """Embeddings that come with the rows, by a name that encoders of kind `given` request."""

    def build(self) -> "ParquetSource":
        return ParquetSource(self)


class ParquetSource(TableSource):
    """The payload of a row is its number in the file, and the digest of the file's footer.

    The driver reads only footers and the key column. With arrays, the digest includes the .npy of each.
    """

    config: ParquetConfig
    layout = ("key", "name", "payload", "is_duplicate")

    def __init__(self, config: ParquetConfig):
        self.config = config
        self.path = require_path(config.path, "parquet")
        self.keys_may_repeat = config.key_column is not None
        self.row_filter = row_filter(config.where)
        self.has_images_at_hand = config.image_column is not None
        self.folders = {name: ArrayFolder(name, array.folder) for name, array in config.arrays.items()}
        self._opened: tuple[tuple[str, str], ParquetRows] | None = None

    def _files(self) -> list[str]:
        return expand(self.path, "source.path", ("parquet",))

    def check(self) -> None:
        files = self._files()
        names = ("image_column", "caption_column", "url_column", "key_column")
        for file in files:
            self.config.check_columns(names, present := columns(file), file)
            if self.row_filter is not None:
                self.row_filter.check(present, file)
        self.config = self.config.with_types(lambda keep: kept_types(keep, files))
        for folder in self.folders.values():
            folder.check(files)
        for file in files if self.folders else ():
            self._digest(file, count_rows(file))
        if next(self.shards(1), None) is None:
            taken = "" if self.row_filter is None else " that source.where takes"
            raise ConfigError(f"source.path: {self.path} holds no rows{taken}; give a file with at least one row")

    def parts(self) -> Iterator[InputPart]:
        self.ignored_files.clear()
        return iter(named_parts(find_files(self.path, "source.path", ("parquet",), ignored=self.ignored_files)))

    def blocks(self, parts: Iterable[InputPart], marks: Marks, number: int = 0) -> Iterator[Block]:
        for part in parts:
            path = f"{self.folder}/{part.path}"
            num_rows = count_rows(path)
            digest, first = self._digest(path, num_rows), part.first
            for rows, found, places in self._keys(path, first, num_rows - first if part.rows is None else part.rows):
                numbers = first + places
                made = row_text.join(f"{part.name}/", row_text.numbers(numbers, 7))
                keys = pc.coalesce(found, made)  # pyright: ignore[reportAttributeAccessIssue]
                repeats = marks.repeats(row_text.decoded(keys)) if self.keys_may_repeat else None
                texts = _texts(keys, part.name, numbers, digest, repeats)
                where = places if len(places) < rows else None
                yield Block(part, first, number, texts, repeats, False, where, rows - len(places))
                number, first = number + rows, first + rows

    def _keys(self, path: str, first: int, rows: int) -> Iterator[tuple[int, pa.Array, np.ndarray]]:
        """Blocks of rows of a file: how many; the keys of those that are kept as the column has them, NULL without
        one; and where these are."""
        column, where = self.config.key_column, self.row_filter
        if column is None and where is None:
            for start in range(0, rows, _ROWS):
                count = min(_ROWS, rows - start)
                yield count, pa.nulls(count, pa.large_string()), np.arange(count)
            return
        wanted = [*([column] if column else []), *(where.columns if where else ())]
        cursor = cursor_at(path, wanted, first, where)
        for chunk in cursor.take(rows):
            kept, places = kept_of(chunk, where)
            yield len(chunk), _keys_of(kept, column), places
        keep_cursor(cursor)

    def _digest(self, path: str, num_rows: int) -> str:
        """Digest of the footer of a file, and of its arrays, which must have as many rows."""
        digests = [folder.check_rows(path, num_rows) for folder in self.folders.values()]
        return " ".join([_footer_digest(path), *digests])

    def estimate_rows(self) -> int | None:
        return estimate_rows(self._files())

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        del scratch
        for path, file_rows in self._by_file(shard, rows):
            for row, record in zip(file_rows, self._read(path, file_rows), strict=True):
                emit(self._original(row, record, path))

    def caption_cells(self, shard: Shard, column: str) -> list[list[str] | None]:
        found: dict[int, list[str] | None] = {}
        for path, rows in self._by_file(shard, self.rows_of(shard)):
            with closing(ParquetRows(path, [column])) as table:
                for row, record in zip(rows, table.read([row.payload[0] for row in rows]), strict=True):
                    found[row.position] = caption_cell(record, column)
        return [found[position] for position in sorted(found)]

    def _by_file(self, shard: Shard, rows: Sequence[SourceRow]) -> Iterator[tuple[str, list[SourceRow]]]:
        """The rows of each file, with its path."""
        by_file: dict[str, list[SourceRow]] = {}
        for row in rows:
            by_file.setdefault(row.name, []).append(row)
        for name, file_rows in by_file.items():
            yield path_of(shard, name, self.folder, self.parts), file_rows

    def _read(self, path: str, rows: Sequence[SourceRow]) -> Iterator[dict[str, Any]]:
        """Records at increasing row numbers. The file stays open for the next shard."""
        config = self.config
        wanted = [c for c in (config.image_column, config.caption_column, config.url_column) if c]
        wanted += config.annotation_names
        version = (path, str(rows[0].payload[1]))
        if self._opened is None or self._opened[0] != version:
            self._close()
            self._opened = (version, ParquetRows(path, wanted, [config.exif_column] if config.exif_column else []))
        try:
            yield from self._opened[1].read([row.payload[0] for row in rows])
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def __getstate__(self) -> dict[str, object]:
        """Workers open files on their own."""
        return {**self.__dict__, "_opened": None}

    def _original(self, row: SourceRow, record: dict[str, Any], path: str) -> Original:
        config = self.config
        try:
            url, annotations = text_of(record, config.url_column), config.annotations(record)
            captions = None if config.caption_column is None else tuple(captions_of(record, config.caption_column))
            orientation = orientation_in(record.get(config.exif_column or ""))
            original = Original(row.position, row.key, url, captions, annotations=annotations, orientation=orientation)
        except BadCell as bad:
            return Original.dropped(row, bad.reason, bad.detail)
        if config.image_column is None:
            return original
        try:
            data, name = image_of(record, config.image_column)
            if name is not None:
                folders = [config.image_folder] if config.image_folder else [path.rpartition("/")[0], self.folder]
                data = read_image_file(name, folders)
        except BadCell as bad:
            return replace(original, reason=bad.reason, detail=bad.detail)
        return replace(original, data=data, reason="no_image" if data is None else None)

    def settings(self) -> object:
        return self.config.row_settings

    def fingerprint(self) -> dict[str, object]:
        config = self.config
        return {
            "image_column": config.image_column,
            "caption_column": config.caption_column,
            **exif_settings(config.exif_column),
            **config.annotation_settings,
        }

    def describe_array(self, name: str) -> dict[str, object]:
        if name not in self.folders:
            raise no_array(name, self.folders)
        return {"folder": True}

    def precomputed(self, shard: Shard, name: str, positions: Sequence[int]) -> Iterator[PrecomputedEmbedding]:
        rows = self.rows_of(shard)
        for row in (rows[position] for position in positions):
            path = path_of(shard, row.name, self.folder, self.parts)
            yield PrecomputedEmbedding(*self.folders[name].read(path, row.payload[0]))


def _footer_digest(path: str) -> str:
    """Digest of a file's footer: sizes, offsets and statistics of every column chunk."""
    with open_file(path) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - length))
        return f"{size}-{xxhash.xxh3_64_hexdigest(file.read())}"


def _keys_of(chunk: Chunk, column: str | None) -> pa.Array:
    if column is None:
        return pa.nulls(len(chunk), pa.large_string())
    if not isinstance(chunk, list) and column in chunk.schema.names:
        try:
            return row_text.keys(chunk.column(column))
        except NotColumnar:
            pass
    return row_text.encoded(key_of(record, column) for record in to_records(chunk))


def _texts(keys: pa.Array, name: str, numbers: np.ndarray, digest: str, repeats: Sequence[bool] | None) -> RowTexts:
    """Rows as a shard has them."""
    named, told = canonical_json(name), canonical_json(digest)
    marks = row_text.booleans(repeats or ())
    own = row_text.numbers(numbers, 1)
    return RowTexts(row_text.join('["', row_text.escape(keys), f'",{named},', own, f",{told},", marks, "],"))
