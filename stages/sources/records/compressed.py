"""Compressed files as the bytes in them, proven to their end: what is damaged, cut off or behind the end is an error.

The first bytes of a file tell how it is compressed, not its name.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa

from stages.sources.records.far import open_file

SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}
"""What the names of compressed files end with, and the compression's name."""
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What decompressors raise for damaged data."""

_BLOCK = 2**20
_STEP = 2**16
"""Decompressed at once: an error takes what the same call had decompressed before with it."""
_REMEMBERED = 2**14
_HEAD_BYTES = 6


class _Streams:
    """Compressed streams one behind the other, each of them whole, with nothing but zeros between and behind them.

    `bz2.BZ2File` and `lzma.LZMAFile` take a second stream that is damaged for the end of the file.
    """

    def __init__(self, file: Any, new_decoder: Callable[[], Any]):
        self._file, self._new_decoder = file, new_decoder
        self._decoder = new_decoder()

    def read(self, size: int) -> bytes:
        while True:
            if self._decoder.eof:
                rest = self._decoder.unused_data.lstrip(b"\0")
                while not rest:
                    block = self._file.read(_BLOCK)
                    if not block:
                        return b""
                    rest = block.lstrip(b"\0")
                self._decoder = self._new_decoder()
            else:
                rest = self._file.read(_BLOCK) if self._decoder.needs_input else b""
                if not rest and self._decoder.needs_input:
                    raise EOFError("the file ends inside a compressed stream")
            if data := self._decoder.decompress(rest, size):
                return data


class _Compression(NamedTuple):
    name: str
    magic: bytes
    open: Callable[[Any], Any]


_COMPRESSIONS = (
    _Compression("gzip", b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    _Compression("bzip2", b"BZh", lambda file: _Streams(file, bz2.BZ2Decompressor)),
    _Compression("xz", b"\xfd7zXZ\0", lambda file: _Streams(file, lzma.LZMADecompressor)),
    _Compression("Zstandard", b"\x28\xb5\x2f\xfd", lambda file: pa.CompressedInputStream(file, "zstd")),
)


class _Borrowed(io.RawIOBase):
    """The bytes of a file from its beginning, which stays open when this is closed; `head` was read already."""

    def __init__(self, file: BinaryIO, head: bytes = b""):
        self._file, self._head = file, head
        self.given, self.is_ended = 0, False
        """How many bytes were read, and whether there were no more."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._file.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        self.given += len(data)
        self.is_ended = not data and len(buffer) > 0
        return len(data)


class Decompressed(io.RawIOBase):
    """The decompressed bytes of a file; reads forward, and from the beginning again where it is sent back.

    Memory is bounded. Damaged data ends it early: `damage` says why, and `unread_bytes` how many of the compressed
    bytes at least were not used.
    """

    def __init__(self, file: BinaryIO, compression: _Compression, head: bytes, *, raises: bool):
        """
        Args:
            head: the bytes at the beginning of the file, which were read already.
            raises: damaged data are an OSError.
        """
        self._file, self._compression, self._raises = file, compression, raises
        self._restart(_Borrowed(file, head))

    def _restart(self, source: _Borrowed) -> None:
        self.damage, self.unread_bytes = "", 0
        self._source, stream = source, self._compression.open(source)
        self._read_some: Callable[[int], bytes] = getattr(stream, "read1", stream.read)
        self._at = 0
        self._behind, self._ahead = b"", b""  # tars are sought back by a block at their end

    def read(self, size: int = -1) -> bytes:
        parts: list[bytes] = []
        while size and (part := self._next(_BLOCK if size < 0 else size)):
            parts.append(part)
            size -= len(part) if size > 0 else 0
            self._at += len(part)
            self._behind = (self._behind + part)[-_REMEMBERED:]
        return b"".join(parts)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        if self._ahead:
            part, self._ahead = self._ahead[:size], self._ahead[size:]
            return part
        if self.damage:
            return b""
        before = self._source.given
        try:
            return self._read_some(min(size, _STEP))
        except DAMAGED as error:
            self.damage = f"the compressed data is damaged: {error}"
            if self._raises:
                raise OSError(self.damage) from error
            self.unread_bytes = 0 if self._source.is_ended else self._file.seek(0, io.SEEK_END) - before
            return b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("the end of compressed data is not known")
        back = self._at - offset
        if 0 < back <= len(self._behind):
            self._ahead = self._behind[-back:] + self._ahead
            self._behind, self._at = self._behind[:-back], offset
        elif back > 0:
            self._file.seek(0)
            self._restart(_Borrowed(self._file))
        while offset > self._at and self.read(min(offset - self._at, _BLOCK)):
            pass
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._file.close()
        super().close()


def open_random(path: str, open: Callable[[str], BinaryIO] = open_file) -> BinaryIO:
    """A file that can be read at any place; a compressed one as if it were not, which ends early where it is damaged.

    Args:
        open: opens the file as it is.
    Raises:
        OSError: it cannot be opened.
    """
    file = open(path)
    head = file.read(_HEAD_BYTES)
    compression = _compression_of(head)
    if compression is None:
        file.seek(0)
        return file
    return cast(BinaryIO, Decompressed(file, compression, head, raises=False))


@contextmanager
def open_whole(path: str) -> Iterator[io.BufferedReader]:
    """A file to be read from its beginning to its end; a compressed one as if it were not.

    Raises:
        OSError: it cannot be opened, is not compressed although its name says so, or where it is read: it is damaged.
    """
    with open_file(path) as file:
        head = file.read(_HEAD_BYTES)
        compression = _compression_of(head)
        expected = next((name for suffix, name in SUFFIXES.items() if path.lower().endswith(suffix)), None)
        if compression is None and expected is not None:
            raise OSError(f"it is no {expected} file, as its name says: it begins with {head!r}")
        raw = _Plain(file, head) if compression is None else Decompressed(file, compression, head, raises=True)
        yield io.BufferedReader(raw, _BLOCK)


class _Plain(_Borrowed):
    """A file that is not compressed; it can be sent to any place if the file can."""

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._head = b""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell() - len(self._head)


def _compression_of(head: bytes) -> _Compression | None:
    return next((each for each in _COMPRESSIONS if head.startswith(each.magic)), None)
