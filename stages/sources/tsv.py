"""Lines of tab-separated fields with an image in base64: the format of PaddleFleetX."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal

import xxhash
from pydantic import Field, field_validator

from imagen_core.store import ColumnType
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.sources.base import Emit, InputPart, Original, Source, SourceRow, require_path
from stages.sources.file_lists import find_listed
from stages.sources.files import base_folder, find_files, named_parts, path_of
from stages.sources.records.cells import BadCell, from_base64
from stages.sources.records.compressed import open_whole
from stages.sources.records.kept import check_names, kept_values

_BLOCK_BYTES = 2**20
_MAX_LINE_BYTES = 2**28


class KeptField(Config):
    """A field that the store keeps, which gets its name here, as the fields of a line have none."""

    field: int = Field(ge=1)
    """Its place in a line, counted from 1."""
    type: ColumnType = "text"
    """bool, int, float or text; what is read must fit."""


class TsvConfig(Config):
    """Tab-separated lines with a caption and an image in base64."""

    kind: Literal["tsv"] = "tsv"
    path: str | None = None
    """A file, plain or compressed (gzip, bzip2, xz, Zstandard), a folder of .tsv files, or a glob; local or any fsspec
    URL. With `file_list` the folder that its names are relative to."""
    file_list: str | None = None
    """A text file that names the files to read, one per line."""
    caption_field: int | None = Field(default=3, ge=1)
    """Place of the caption in a line, counted from 1; null: every caption is empty."""
    image_field: int = Field(default=5, ge=1)
    """Place of the image, in base64, counted from 1."""
    url_field: int | None = Field(default=None, ge=1)
    """Place of the image's URL, kept for lineage."""
    keep_columns: dict[str, KeptField] = Field(default_factory=dict)
    """Fields that the store keeps, by name, such as `{score: {field: 4, type: float}}`, for `sample.columns` and the
    `where` of a training. A value of another type is the drop `unsupported_type`, an empty one is NULL."""

    @field_validator("keep_columns")
    @classmethod
    def _check_kept(cls, columns: dict[str, KeptField]) -> dict[str, KeptField]:
        check_names(columns)
        return columns

    def build(self) -> "TsvSource":
        return TsvSource(self)


class TsvSource(Source):
    """The payload of a row is offset, bytes and digest of its line; offsets are in the uncompressed file.

    The driver reads every file once, block by block. A shard of a compressed file is read from its beginning.
    """

    layout = ("key", "name", "payload")
    has_images_at_hand = True

    def __init__(self, config: TsvConfig):
        self.config = config
        self.path = require_path(config.path, "tsv")

    @property
    def column_types(self) -> dict[str, ColumnType]:
        return {name: kept.type for name, kept in self.config.keep_columns.items()}

    @cached_property
    def folder(self) -> str:
        return base_folder(self.path)

    def check(self) -> None:
        if next(self.shards(1), None) is None:
            raise ConfigError(f"source.path: {self.path} holds no lines; give a file with at least one")

    def parts(self) -> Iterator[InputPart]:
        if self.config.file_list is not None:
            return iter(named_parts(find_listed(self.path, self.config.file_list)))
        self.ignored_files.clear()
        return iter(named_parts(find_files(self.path, "source.path", ("tsv",), ignored=self.ignored_files)))

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        for part in parts:
            path = f"{self.folder}/{part.path}"
            try:
                with open_whole(path) as file:
                    for number, line in enumerate(_lines(file)):
                        yield part, SourceRow(f"{part.name}/{number:07d}", part.name, payload=line)
            except OSError as error:
                raise ConfigError(f"source.path: {path} cannot be read to its end: {error}; write it again") from error

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        del scratch
        for name, file_rows in groupby(rows, key=lambda row: row.name):
            path = path_of(shard, name, self.folder, self.parts)
            with open_whole(path) as file:
                for row in file_rows:
                    emit(self._original(row, file))

    def _original(self, row: SourceRow, file: BinaryIO) -> Original:
        config = self.config
        offset, size, _ = row.payload
        if size > _MAX_LINE_BYTES:
            return Original.dropped(row, "too_large", f"a line of {size:,} bytes")
        file.seek(offset)
        fields = file.read(size).rstrip(b"\r\n").split(b"\t")
        last = max(self._fields)
        if len(fields) < last:
            return Original.dropped(row, "missing_fields", f"{len(fields)} fields, {last} needed")
        url = _text(fields, config.url_field) or None
        caption = _text(fields, config.caption_field)
        image = fields[config.image_field - 1]
        captions = None if caption is None else (caption,)
        try:
            annotations = self._annotations(fields)
        except BadCell as bad:
            return Original.dropped(row, bad.reason, bad.detail)
        original = Original(row.position, row.key, url, captions, annotations=annotations)
        if not image:
            return replace(original, reason="no_image")
        try:
            return replace(original, data=from_base64(image))
        except BadCell as bad:
            return replace(original, reason=bad.reason, detail=bad.detail)

    @cached_property
    def _fields(self) -> list[int]:
        """The places that are read."""
        config = self.config
        kept = [each.field for each in config.keep_columns.values()]
        return [place for place in (config.caption_field, config.image_field, config.url_field, *kept) if place]

    def _annotations(self, fields: Sequence[bytes]) -> dict[str, Any]:
        kept = self.config.keep_columns
        record = {name: _text(fields, each.field) for name, each in kept.items()}
        return {"columns": kept_values(record, self.column_types)} if kept else {}

    def fingerprint(self) -> dict[str, object]:
        config = self.config
        kept = {name: each.model_dump() for name, each in config.keep_columns.items()}
        places = {name: getattr(config, name) for name in ("caption_field", "image_field", "url_field")}
        return {**places, **({"keep_columns": kept} if kept else {})}


def _text(fields: Sequence[bytes], place: int | None) -> str | None:
    return None if place is None else fields[place - 1].decode("utf-8", "surrogateescape")


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, str]]:
    """Offset, bytes and digest of each line that is not blank; holds one block, however long a line is."""
    offset = size = 0
    hashed, is_blank = xxhash.xxh3_64(), True
    while block := file.readline(_BLOCK_BYTES):
        hashed.update(block)
        size += len(block)
        is_blank = is_blank and not block.strip(b"\r\n")
        if block.endswith(b"\n"):
            if not is_blank:
                yield offset, size, hashed.hexdigest()
            offset, size = offset + size, 0
            hashed, is_blank = xxhash.xxh3_64(), True
    if not is_blank:
        yield offset, size, hashed.hexdigest()
