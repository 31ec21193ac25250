"""Parquet files with the images' bytes in a column."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import fsspec
import xxhash
from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.images.exif_text import exif_settings, orientation_in
from stages.sources.annotations import AnnotationsConfig
from stages.sources.arrays.folders import ArrayFolder, FolderArrayConfig, no_array
from stages.sources.base import (
    Emit,
    InputPart,
    Original,
    PrecomputedEmbedding,
    Source,
    SourceRow,
    require_path,
)
from stages.sources.files import base_folder, expand, find_files, named_parts, path_of
from stages.sources.tables import captions_of, columns, count_rows, estimate_rows, open_parquet, to_records

if TYPE_CHECKING:
    import pyarrow.parquet as pq


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
    exif_column: str | None = "exif"
    """Column of the EXIF as img2dataset keeps it, JSON with `Image Orientation`: it turns images that have no
    orientation of their own. The column need not be there. null: it is not used."""
    arrays: dict[str, FolderArrayConfig] = Field(default_factory=dict)
    """Embeddings that come with the rows, by a name that encoders of kind `given` request."""

    def build(self) -> "ParquetSource":
        return ParquetSource(self)


class ParquetSource(Source):
    """The payload of a row is its number in the file, and the digest of the file's footer.

    The driver reads only footers and the key column. With arrays, the digest includes the .npy of each.
    """

    layout = ("key", "name", "payload", "is_duplicate")

    def __init__(self, config: ParquetConfig):
        self.config = config
        self.path = require_path(config.path, "parquet")
        self.keys_may_repeat = config.key_column is not None
        self.folders = {name: ArrayFolder(name, array.folder) for name, array in config.arrays.items()}

    @cached_property
    def folder(self) -> str:
        return base_folder(self.path)

    def _files(self) -> list[str]:
        return expand(self.path, "source.path", ("parquet",))

    def check(self) -> None:
        files = self._files()
        names = ("image_column", "caption_column", "url_column", "key_column")
        self.config.check_columns(names, columns(files[0]), files[0])
        for folder in self.folders.values():
            folder.check(files)
        for file in files if self.folders else ():
            self._digest(file, count_rows(file))
        if next(self.shards(1), None) is None:
            raise ConfigError(f"source.path: {self.path} holds no rows; give a file with at least one row")

    def parts(self) -> Iterator[InputPart]:
        return iter(named_parts(find_files(self.path, "source.path", ("parquet",))))

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        for part in parts:
            path = f"{self.folder}/{part.path}"
            with open_parquet(path) as table:
                digest = self._digest(path, table.metadata.num_rows)
                for number, key in enumerate(self._keys(table)):
                    key = f"{part.name}/{number:07d}" if key is None else str(key)
                    yield part, SourceRow(key, part.name, payload=(number, digest))

    def _keys(self, table: "pq.ParquetFile") -> Iterator[object]:
        """The key of each row of a file as its column has it; None without one."""
        if self.config.key_column is None:
            yield from repeat(None, table.metadata.num_rows)
            return
        for batch in table.iter_batches(columns=[self.config.key_column]):
            for (key,) in (record.values() for record in to_records(batch)):
                yield key

    def _digest(self, path: str, num_rows: int) -> str:
        """Digest of the footer of a file, and of its arrays, which must have as many rows."""
        digests = [folder.check_rows(path, num_rows) for folder in self.folders.values()]
        return " ".join([_footer_digest(path), *digests])

    def estimate_rows(self) -> int | None:
        return estimate_rows(self._files())

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        del scratch
        by_file: dict[str, list[SourceRow]] = {}
        for row in rows:
            by_file.setdefault(row.name, []).append(row)
        for name, file_rows in by_file.items():
            path = path_of(shard, name, self.folder, self.parts)
            for row, record in zip(file_rows, self._read(path, file_rows), strict=True):
                emit(self._original(row, record))

    def _read(self, path: str, rows: Sequence[SourceRow]) -> Iterator[dict[str, Any]]:
        """Records at increasing row numbers, reading only the row groups that hold them."""
        import pyarrow.parquet as pq

        config = self.config
        names = [c for c in (config.image_column, config.caption_column, config.url_column) if c]
        names += config.annotation_columns.values()
        numbers = [row.payload[0] for row in rows]
        with fsspec.open(path, "rb") as file:
            table = pq.ParquetFile(cast(Any, file))
            names += [name for name in table.schema_arrow.names if name == config.exif_column and name not in names]
            first = 0
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                inside = [number - first for number in numbers if first <= number < first + size]
                if inside:
                    chunk = table.read_row_group(group, columns=names)
                    for number in inside:
                        yield to_records(chunk.slice(number, 1))[0]
                first += size

    def _original(self, row: SourceRow, record: dict[str, Any]) -> Original:
        config = self.config
        url = record.get(config.url_column) if config.url_column else None
        data = image_bytes(record[config.image_column]) if config.image_column else None
        return Original(
            row.position,
            row.key,
            None if url is None else str(url),
            tuple(captions_of(record, config.caption_column)),
            data,
            "no_image" if config.image_column and data is None else None,
            annotations=config.annotations(record),
            orientation=orientation_in(record.get(config.exif_column or "")),
        )

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
