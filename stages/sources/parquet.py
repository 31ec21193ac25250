"""Parquet files with the images' bytes in a column."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import fsspec
import xxhash
from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.captions import clean_captions
from stages.sources.annotations import ANNOTATION_COLUMNS, AnnotationsConfig
from stages.sources.arrays.folders import ArrayFolder, FolderArrayConfig, no_array
from stages.sources.base import (
    Emit,
    InputPart,
    Original,
    PrecomputedEmbedding,
    Row,
    Source,
    mark_duplicates,
    require_path,
)
from stages.sources.files import base_folder, expand, find_files, named_parts, path_of
from stages.sources.tables import columns, count_rows, estimate_rows, open_parquet, to_records
from stages.sources.urls import captions_of


class ParquetConfig(AnnotationsConfig):
    """Parquet files with image bytes."""

    kind: Literal["parquet"] = "parquet"
    path: str | None = None
    """A parquet file, a folder of them, or a glob; local or any fsspec URL."""
    image_column: str | None = "image"
    """Column of the encoded image: binary, or a struct with a field `bytes` as datasets write it. null: there are no
    images, only captions and what `arrays` has."""
    caption_column: str = "caption"
    """Column of the caption, or of a list of captions."""
    url_column: str | None = None
    """Column of the image's URL, kept for lineage."""
    key_column: str | None = None
    """Column of a unique key; default: file name and row number."""
    arrays: dict[str, FolderArrayConfig] = Field(default_factory=dict)
    """Embeddings that come with the rows, by a name that encoders of kind `given` ask for."""

    def build(self) -> "ParquetSource":
        return ParquetSource(self)


class ParquetSource(Source):
    """A row is [key, file name, row number, digest of the footer, is_duplicate].

    The driver reads footers and the key column only. With arrays, the digest is also of the .npy of each.
    """

    def __init__(self, config: ParquetConfig):
        self.config = config
        self.path = require_path(config.path, "parquet")
        self.folders = {name: ArrayFolder(name, array.folder) for name, array in config.arrays.items()}

    @cached_property
    def folder(self) -> str:
        return base_folder(self.path)

    def _files(self) -> list[str]:
        return expand(self.path, "source.path", ("parquet",))

    def check(self) -> None:
        files = self._files()
        present = columns(files[0])
        for name in ("image_column", "caption_column", "url_column", "key_column", *ANNOTATION_COLUMNS):
            column = getattr(self.config, name)
            if column is not None and column not in present:
                raise ConfigError(f"source.{name}: {files[0]} has no column {column!r}; it has: {', '.join(present)}")
        for folder in self.folders.values():
            folder.check(files)
        for file in files if self.folders else ():
            self._digest(file, count_rows(file))
        if next(self.shards(1), None) is None:
            raise ConfigError(f"source.path: {self.path} holds no rows; give a file with at least one row")

    def parts(self) -> Iterator[InputPart]:
        return iter(named_parts(find_files(self.path, "source.path", ("parquet",))))

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, Row]]:
        rows = ((part, row) for part in parts for row in self._rows(part))
        if self.config.key_column is None:
            return ((part, [*row, False]) for part, row in rows)
        return mark_duplicates(rows)

    def _rows(self, part: InputPart) -> Iterator[Row]:
        name, path = part.name, f"{self.folder}/{part.path}"
        with open_parquet(path) as table:
            footer = self._digest(path, table.metadata.num_rows)
            if self.config.key_column is None:
                for row in range(table.metadata.num_rows):
                    yield [f"{name}/{row:07d}", name, row, footer]
                return
            row = 0
            for batch in table.iter_batches(columns=[self.config.key_column]):
                for (key,) in (record.values() for record in to_records(batch)):
                    yield [f"{name}/{row:07d}" if key is None else str(key), name, row, footer]
                    row += 1

    def _digest(self, path: str, num_rows: int) -> str:
        """Of the footer of a file, and of its arrays, which must have as many rows."""
        digests = [folder.check_rows(path, num_rows) for folder in self.folders.values()]
        return " ".join([_footer_digest(path), *digests])

    def estimate_rows(self) -> int | None:
        return estimate_rows(self._files())

    def fetch(self, shard: Shard, wanted: frozenset[str] | None, scratch: Path, emit: Emit) -> None:
        del scratch
        rows = cast(Sequence[tuple[str, str, int, str, bool]], shard.rows)
        by_file: dict[str, list[tuple[int, str, int]]] = {}
        for position, (key, name, row, _, is_duplicate) in enumerate(rows):
            if wanted is not None and key not in wanted:
                continue
            if is_duplicate:
                emit(Original(position, key, None, (), None, "duplicate_key"))
            else:
                by_file.setdefault(name, []).append((position, key, row))
        for name, places in by_file.items():
            path = path_of(shard, name, self.folder, self.parts)
            for (position, key, _), record in zip(places, self._read(path, places), strict=True):
                emit(self._original(position, key, record))

    def _read(self, path: str, places: Sequence[tuple[int, str, int]]) -> Iterator[dict[str, Any]]:
        """Records at increasing row numbers, reading only the row groups that hold them."""
        import pyarrow.parquet as pq

        config = self.config
        names = [c for c in (config.image_column, config.caption_column, config.url_column) if c]
        names += config.annotation_columns.values()
        wanted = [row for _, _, row in places]
        with fsspec.open(path, "rb") as file:
            table = pq.ParquetFile(cast(Any, file))
            first = 0
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                inside = [row - first for row in wanted if first <= row < first + size]
                if inside:
                    chunk = table.read_row_group(group, columns=names)
                    for row in inside:
                        yield to_records(chunk.slice(row, 1))[0]
                first += size

    def _original(self, position: int, key: str, record: dict[str, Any]) -> Original:
        config = self.config
        url = record.get(config.url_column) if config.url_column else None
        url = None if url is None else str(url)
        captions, reason = clean_captions(captions_of(record, config.caption_column), allow_empty=False)
        data = image_bytes(record[config.image_column]) if config.image_column else None
        if reason is None and data is None and config.image_column:
            reason = "no_image"
        annotations = config.annotations(record)
        return Original(position, key, url, captions, None if reason else data, reason, annotations=annotations)

    def fingerprint(self) -> dict[str, object]:
        config = self.config
        return {
            "image_column": config.image_column,
            "caption_column": config.caption_column,
            **config.annotation_settings,
        }

    def describe_array(self, name: str) -> dict[str, object]:
        if name not in self.folders:
            raise no_array(name, self.folders)
        return {"folder": True}

    def given(self, shard: Shard, name: str, rows: Sequence[int]) -> Iterator[PrecomputedEmbedding]:
        sources = shard.rows
        for _, file, place, *_ in (sources[row] for row in rows):
            path = path_of(shard, file, self.folder, self.parts)
            yield PrecomputedEmbedding(*self.folders[name].read(path, place))


def _footer_digest(path: str) -> str:
    """Digest of a file's footer: sizes, offsets and statistics of every column chunk."""
    with fsspec.open(path, "rb") as raw:
        file = cast(Any, raw)
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - length))
        return f"{size}-{xxhash.xxh3_64_hexdigest(file.read())}"


def image_bytes(value: object) -> bytes | None:
    """The encoded image in a cell: bytes, or a struct with `bytes`."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None
