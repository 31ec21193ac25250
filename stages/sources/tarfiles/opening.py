"""Opens tars, plain or compressed, as files that can be read at any offset of the tar."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Self, cast

import fsspec
import pyarrow as pa

from pipeline.errors import ConfigError

_BLOCK = 2**20
_REMEMBERED = 2**14
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what decompressors raise for damaged data

Span = tuple[int, int]
"""Offset and size of a member's bytes in its tar, after decompression."""


def _open_zstd(file: Any) -> Any:
    return pa.CompressedInputStream(file, "zstd")


_OPENERS: Mapping[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _open_zstd,
}


class _Borrowed(io.RawIOBase):
    """The bytes of a file that stays open when this is closed."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Decompressed:
    """The decompressed bytes of a file; reads forward, and from the beginning again where it is sent back.

    Damaged data ends it early; `damage` says why. Memory is bounded.
    """

    def __init__(self, file: BinaryIO, opener: Callable[[Any], Any]):
        self.damage = ""
        self._file, self._opener = file, opener
        self._restart()

    def _restart(self) -> None:
        self._file.seek(0)
        self._stream = self._opener(_Borrowed(self._file))
        self._at = 0
        self._behind, self._ahead = b"", b""  # tars are sought back by a block at their end

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0 and (part := self._next(size)):
            parts.append(part)
            size -= len(part)
            self._at += len(part)
            self._behind = (self._behind + part)[-_REMEMBERED:]
        return b"".join(parts)

    def _next(self, size: int) -> bytes:
        if self._ahead:
            part, self._ahead = self._ahead[:size], self._ahead[size:]
            return part
        if self.damage:
            return b""
        try:
            return self._stream.read(min(size, _BLOCK))
        except _DAMAGED as error:
            self.damage = f"the compressed data is damaged: {error}"
            return b""

    def seek(self, offset: int) -> int:
        back = self._at - offset
        if 0 < back <= len(self._behind):
            self._ahead = self._behind[-back:] + self._ahead
            self._behind, self._at = self._behind[:-back], offset
        elif back > 0:
            self.damage = ""
            self._restart()
        while offset > self._at and self.read(min(offset - self._at, _BLOCK)):
            pass
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._file.close()


def open_tar(path: str) -> BinaryIO:
    """A tar as an open file; a compressed one, which its first bytes tell, as if it were not.

    Raises:
        ConfigError: it cannot be opened.
    """
    try:
        file = cast(BinaryIO, cast(Any, fsspec.open(path, "rb")).open())
    except OSError as error:
        raise ConfigError(
            f"source.path: {path} cannot be opened: {error.strerror or error}; give a tar that this user may read"
        ) from error
    head = file.read(6)
    file.seek(0)
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
    return file if opener is None else cast(BinaryIO, Decompressed(file, opener))


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
