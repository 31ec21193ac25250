"""Opens tars, plain or compressed, as files that can be read at any offset of the tar."""

from collections.abc import Callable
from typing import BinaryIO, Self

from pipeline.errors import ConfigError
from stages.sources.records.compressed import open_random

Span = tuple[int, int]
"""Offset and size of a member's bytes in its tar, after decompression."""


def open_tar(path: str) -> BinaryIO:
    """A tar as an open file; a compressed one, which its first bytes tell, as if it were not.

    Raises:
        ConfigError: it cannot be opened.
    """
    try:
        return open_random(path)
    except OSError as error:
        raise ConfigError(
            f"source.path: {path} cannot be opened: {error.strerror or error}; give a tar that this user may read"
        ) from error


def read_span(file: BinaryIO, span: Span) -> bytes:
    """The bytes of a member; fewer if the tar ends inside it."""
    return b"" if file.seek(span[0]) != span[0] else file.read(span[1])


class OpenTars:
    """Opens tars by name, and keeps the last one open."""

    def __init__(self, path_of_tar: Callable[[str], str]):
        self._path_of_tar = path_of_tar
        self._opened: tuple[str, BinaryIO] | None = None

    def open(self, name: str) -> BinaryIO:
        if self._opened is None or self._opened[0] != name:
            self.close()
            self._opened = (name, open_tar(self._path_of_tar(name)))
        return self._opened[1]

    def close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
