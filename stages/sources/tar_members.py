"""The members of webdataset tars: found by headers alone, read by offset, never unpacked."""

import logging
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Self, cast

import fsspec

from pipeline.errors import ConfigError
from stages.sources.folder import IMAGE_SUFFIXES

log = logging.getLogger(__name__)

CONTENT = ("image", "txt", "json", "cls")
PICKLES = ("pickle", "pkl")
_ARRAYS = ("npy", *PICKLES)

Span = tuple[int, int]
"""Offset and size of a member's bytes in its tar."""


def index_tar(path: str) -> Iterator[tuple[str, dict[str, Span]]]:
    """Streams (key, members) of a tar from its headers alone.

    The key is the member's path up to the first dot of its file name, as in webdataset. A member that comes
    twice starts another sample, so that no row vanishes uncounted.

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
            log.warning("%s is truncated (%s); the samples before that place are used", path, error)
    if key is not None:
        yield key, members


def _kind(suffix: str) -> str | None:
    """What a member is: `image`, `txt`, `json`, or the full suffix of one that may hold an array."""
    lower = suffix.lower()
    last = lower.rpartition(".")[2]
    if f".{last}" in IMAGE_SUFFIXES:
        return "image"
    return lower if lower in CONTENT or last in _ARRAYS else None


def read_span(file: BinaryIO, span: Span) -> bytes:
    """The bytes of a member."""
    file.seek(span[0])
    return file.read(span[1])


class OpenTars:
    """Opens tars by name, and keeps the last one open."""

    def __init__(self, path_of_tar: Callable[[str], str]):
        self._path_of_tar = path_of_tar
        self._opened: tuple[str, BinaryIO] | None = None

    def open(self, name: str) -> BinaryIO:
        if self._opened is None or self._opened[0] != name:
            self.close()
            path = self._path_of_tar(name)
            self._opened = (name, cast(BinaryIO, cast(Any, fsspec.open(path, "rb")).open()))
        return self._opened[1]

    def close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
