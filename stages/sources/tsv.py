"""Lines of tab-separated fields with an image in base64: the format of PaddleFleetX."""

import base64
import binascii
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import fsspec
import xxhash
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.captions import clean_captions
from stages.sources.base import Emit, InputPart, Original, Row, Source, require_path
from stages.sources.file_lists import find_listed
from stages.sources.files import base_folder, find_files, named_parts, path_of

_BLOCK_BYTES = 2**20
_MAX_LINE_BYTES = 2**28


class TsvConfig(Config):
    """Tab-separated lines with a caption and an image in base64."""

    kind: Literal["tsv"] = "tsv"
    path: str | None = None
    """A file, plain or .gz, a folder of .tsv and .tsv.gz files, or a glob; local or any fsspec URL. With `file_list`
    the folder that its names are relative to."""
    file_list: str | None = None
    """A text file that names the files to read, one a line."""
    caption_field: int = Field(default=3, ge=1)
    """Place of the caption in a line, counted from 1."""
    image_field: int = Field(default=5, ge=1)
    """Place of the image, in base64, counted from 1."""
    url_field: int | None = Field(default=None, ge=1)
    """Place of the image's URL, kept for lineage."""

    def build(self) -> "TsvSource":
        return TsvSource(self)


class TsvSource(Source):
    """A row is [key, file name, offset, bytes, digest] of a line; offsets are in the uncompressed file.

    The driver reads every file once, block by block. A shard of a .gz is read from the beginning of the file.
    """

    def __init__(self, config: TsvConfig):
        self.config = config
        self.path = require_path(config.path, "tsv")

    @cached_property
    def folder(self) -> str:
        return base_folder(self.path)

    def check(self) -> None:
        if next(self.shards(1), None) is None:
            raise ConfigError(f"source.path: {self.path} holds no lines; give a file with at least one")

    def parts(self) -> Iterator[InputPart]:
        if self.config.file_list is not None:
            return iter(named_parts(find_listed(self.path, self.config.file_list)))
        return iter(named_parts(find_files(self.path, "source.path", ("tsv",))))

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, Row]]:
        for part in parts:
            path = f"{self.folder}/{part.path}"
            try:
                with fsspec.open(path, "rb", compression="infer") as file:
                    for number, line in enumerate(_lines(cast(BinaryIO, file))):
                        yield part, [f"{part.name}/{number:07d}", part.name, *line]
            except (OSError, EOFError, zlib.error) as error:
                raise ConfigError(f"source.path: {path} cannot be read to its end: {error}; make it anew") from error

    def fetch(self, shard: Shard, wanted: frozenset[str] | None, scratch: Path, emit: Emit) -> None:
        del scratch
        by_file: dict[str, list[tuple[int, str, int, int]]] = {}
        for row, (key, name, offset, size, _) in enumerate(shard.rows):
            if wanted is None or key in wanted:
                by_file.setdefault(name, []).append((row, key, offset, size))
        for name, places in by_file.items():
            path = path_of(shard, name, self.folder, self.parts)
            with fsspec.open(path, "rb", compression="infer") as opened:
                file = cast(Any, opened)
                for row, key, offset, size in places:
                    if size > _MAX_LINE_BYTES:
                        emit(Original(row, key, None, (), None, "too_large", f"a line of {size:,} bytes"))
                        continue
                    file.seek(offset)
                    emit(self._original(row, key, file.read(size)))

    def _original(self, row: int, key: str, line: bytes) -> Original:
        config = self.config
        fields = line.rstrip(b"\r\n").split(b"\t")
        last = max(config.caption_field, config.image_field, config.url_field or 1)
        if len(fields) < last:
            return Original(row, key, None, (), None, "missing_fields", f"{len(fields)} fields, {last} needed")
        url = fields[config.url_field - 1].decode("utf-8", "surrogateescape") or None if config.url_field else None
        caption = fields[config.caption_field - 1].decode("utf-8", "surrogateescape")
        captions, reason = clean_captions([caption], allow_empty=False)
        if reason is not None:
            return Original(row, key, url, captions, None, reason)
        image = fields[config.image_field - 1]
        if not image:
            return Original(row, key, url, captions, None, "no_image")
        try:
            return Original(row, key, url, captions, base64.b64decode(image, validate=True))
        except binascii.Error as error:
            return Original(row, key, url, captions, None, "bad_base64", str(error))

    def fingerprint(self) -> dict[str, object]:
        config = self.config
        return {name: getattr(config, name) for name in ("caption_field", "image_field", "url_field")}


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
