"""webdataset tars: members of equal base name form a sample."""

import json
import logging
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import fsspec

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.captions import clean_captions
from stages.sources.base import Emit, Original, Piece, Row, Source, mark_duplicates, require_path
from stages.sources.files import base_folder, find_files, named_pieces, path_of
from stages.sources.folder import IMAGE_SUFFIXES
from stages.sources.urls import captions_of

log = logging.getLogger(__name__)

Span = tuple[int, int]
"""Offset and size of a member's bytes in its tar."""


class WebdatasetConfig(Config):
    """webdataset tars, as img2dataset and others write them."""

    kind: Literal["webdataset"] = "webdataset"
    path: str | None = None
    """A tar, a folder of tars, a glob, or a brace range such as `data/{00000..00099}.tar`."""
    caption_column: str = "caption"
    """Key of the caption in KEY.json; used where there is no KEY.txt."""

    def build(self) -> "WebdatasetSource":
        return WebdatasetSource(self)


class WebdatasetSource(Source):
    """A row is [key, tar, {image, txt, json -> span}, is_duplicate]; only tar headers are read in the driver."""

    def __init__(self, config: WebdatasetConfig):
        self.config = config
        self.path = require_path(config.path, "webdataset")

    @cached_property
    def folder(self) -> str:
        return base_folder(self.path)

    def check(self) -> None:
        if next(self.shards(1), None) is None:
            raise ConfigError(f"source.path: {self.path} holds no samples; give tars with at least one member")

    def pieces(self) -> Iterator[Piece]:
        return iter(named_pieces(find_files(self.path, "source.path", ("tar",), braces=True)))

    def rows(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Row]]:
        return mark_duplicates(self._rows(pieces))

    def _rows(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Row]]:
        for piece in pieces:
            for key, members in index_tar(f"{self.folder}/{piece.path}"):
                yield piece, [f"{piece.name}/{key}", piece.name, members]

    def fetch(self, shard: Shard, wanted: frozenset[str] | None, scratch: Path, emit: Emit) -> None:
        del scratch
        rows = cast(Sequence[tuple[str, str, dict[str, Span], bool]], shard.rows)
        opened: tuple[str, BinaryIO] | None = None
        try:
            for row, (key, name, members, is_duplicate) in enumerate(rows):
                if wanted is not None and key not in wanted:
                    continue
                if opened is None or opened[0] != name:
                    if opened is not None:
                        opened[1].close()
                    path = path_of(shard, name, self.folder, self.pieces)
                    opened = (name, cast(BinaryIO, cast(Any, fsspec.open(path, "rb")).open()))
                emit(self._read(opened[1], row, key, members, is_duplicate))
        finally:
            if opened is not None:
                opened[1].close()

    def _read(self, file: BinaryIO, row: int, key: str, members: dict[str, Span], is_duplicate: bool) -> Original:
        if is_duplicate:
            return Original(row, key, None, (), None, "duplicate_key")
        if "image" not in members:
            return Original(row, key, None, (), None, "no_image", f"members: {', '.join(sorted(members))}")
        content = {kind: _read_span(file, span) for kind, span in members.items()}
        if any(len(content[kind]) < size for kind, (_, size) in members.items()):
            return Original(row, key, None, (), None, "truncated", "the tar ends inside this sample")
        metadata = _json_object(content.get("json"))
        text = content.get("txt")
        if text is not None:
            raw_captions = [text.decode("utf-8-sig", "surrogateescape")]
        else:
            raw_captions = captions_of(metadata, self.config.caption_column)
        url = metadata.get("url")
        url = url if isinstance(url, str) else None
        captions, reason = clean_captions(raw_captions, allow_empty=False)
        if reason is not None:
            return Original(row, key, url, captions, None, reason)
        return Original(row, key, url, captions, content["image"])

    def fingerprint(self) -> dict[str, object]:
        return {"caption_column": self.config.caption_column}


def index_tar(path: str) -> Iterator[tuple[str, dict[str, Span]]]:
    """Streams (key, members) of a tar from its headers alone.

    The key is the member's path up to the first dot of its file name, as in webdataset. A member that comes
    twice starts a sample of its own, so that no row vanishes uncounted.

    Raises:
        ConfigError: the file is no tar.
    """
    key: str | None = None
    members: dict[str, Span] = {}
    suffixes: set[str] = set()
    with fsspec.open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=cast(Any, file), mode="r:") as archive:
                for member in archive:
                    cast(Any, archive).members = []  # or the list of all headers would grow in memory
                    if not member.isfile():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    base, _, suffix = name.partition(".")
                    this = f"{folder}/{base}" if folder else base
                    if key is not None and (this != key or suffix in suffixes):
                        yield key, members
                        members, suffixes = {}, set()
                    key = this
                    suffixes.add(suffix)
                    kind = _kind(suffix)
                    if kind is not None:
                        members.setdefault(kind, (member.offset_data, member.size))
        except tarfile.ReadError as error:
            if key is None:
                raise ConfigError(f"source.path: {path} is not a readable tar: {error}") from error
            log.warning("%s is cut off (%s); the samples before the cut are used", path, error)
    if key is not None:
        yield key, members


def _kind(suffix: str) -> str | None:
    lower = suffix.lower()
    if f".{lower.rpartition('.')[2]}" in IMAGE_SUFFIXES:
        return "image"
    return lower if lower in ("txt", "json") else None


def _read_span(file: BinaryIO, span: Span) -> bytes:
    file.seek(span[0])
    return file.read(span[1])


def _json_object(data: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
