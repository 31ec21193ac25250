"""Opens tars, plain or compressed, as files that can be read at any offset of the tar."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import BinaryIO, Self

from pipeline.errors import ConfigError
from stages.sources.records.compressed import open_random
from stages.sources.records.far import open_ranged

Span = tuple[int, int]
"""Offset and size of a member's bytes in its tar, after decompression."""


def open_tar(path: str, planned: Span | None = None) -> BinaryIO:
    """A tar as an open file; a compressed one, which its first bytes tell, as if it were not.

    Args:
        planned: the part of a plain tar that will be read from its beginning to its end; of an object store nothing
            else is read ahead.
    Raises:
        ConfigError: it cannot be opened.
    """
    try:
        start, size = planned or (0, 0)
        return open_random(path, lambda path: open_ranged(path, (start, start + size)))
    except OSError as error:
        raise ConfigError(
            f"source.path: {path} cannot be opened: {error.strerror or error}; give a tar that this user may read"
        ) from error


def read_span(file: BinaryIO, span: Span) -> bytes:
    """The bytes of a member; fewer if the tar ends inside it."""
    return b"" if file.seek(span[0]) != span[0] else file.read(span[1])


class OpenTars:
    """Opens tars by name, and keeps the last one open."""

    def __init__(
        self,
        path_of_tar: Callable[[str], str],
        spans: Iterable[tuple[str, Span]] = (),
        copies: Mapping[str, str] | None = None,
    ):
        """
        Args:
            spans: name of the tar and place of all that will be read.
            copies: paths of copies of tars by name, which only some machines have.
        """
        self._path_of_tar, self._copies = path_of_tar, copies or {}
        self._planned: dict[str, Span] = {}
        for name, (offset, size) in spans:
            first, length = self._planned.get(name, (offset, size))
            start = min(first, offset)
            self._planned[name] = start, max(first + length, offset + size) - start
        self._opened: tuple[str, BinaryIO] | None = None

    def open(self, name: str) -> BinaryIO:
        if self._opened is None or self._opened[0] != name:
            self.close()
            self._opened = (name, self._open(name))
        return self._opened[1]

    def _open(self, name: str) -> BinaryIO:
        if name in self._copies and os.path.exists(self._copies[name]):
            with suppress(ConfigError):  # it just went, to make room
                return open_tar(self._copies[name])
        return open_tar(self._path_of_tar(name), self._planned.get(name))

    def close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
