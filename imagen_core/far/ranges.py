"""Files of object stores, read in ranges: of a large file only what is wanted comes."""

import errno
import io
from typing import Any

from imagen_core.far.calls import IncompleteError, call

_LEAST_BYTES = 2048
"""After a jump: the headers of a tar around a small member."""
_MOST_BYTES = 5 * 2**20
_PLANNED_BYTES = 32 * 2**20
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs")


def has_ranges(url: str) -> bool:
    """Whether a URL is one of an object store, all of which answer with the range that is asked for."""
    return url.partition("://")[0] in _OBJECT_STORES


class RangedFile(io.RawIOBase):
    """A file of an object store. It is not asked for its size, and nothing but ranges of it is read.

    After a jump a range is small; while reading goes on from range to range it grows. Not to be used by several
    threads at once.

    Raises, on reading:
        FileNotFoundError, StorageError: see `call`.
    """

    def __init__(self, filesystem: Any, path: str, url: str, planned: tuple[int, int] = (0, 0)) -> None:
        """
        Args:
            url: for messages.
            planned: first byte and end of a part that will be read from its beginning to its end.
        """
        self._filesystem, self._path, self._url, self._planned = filesystem, path, url, planned
        self._at = 0
        self._start, self._data = 0, b""
        self._window = _LEAST_BYTES
        self._size: int | None = None
        """Known once a range ended early."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence)
        self._at = (self._asked_size() if base is None else base) + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left, parts = self._asked_size() - self._at if size is None or size < 0 else size, []
        while left > 0 and (part := self._some(left)):
            parts.append(part)
            self._at += len(part)
            left -= len(part)
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _some(self, wanted: int) -> bytes:
        """The next bytes, at most `wanted`; none at the end of the file."""
        if not self._start <= self._at < self._start + len(self._data):
            if self._size is not None and self._at >= self._size:
                return b""
            stop = self._stop(wanted)
            self._data = call(self._url, "read", lambda: self._range(self._at, stop))
            self._start = self._at
        place = self._at - self._start
        return self._data[place : place + wanted]

    def _stop(self, wanted: int) -> int:
        """Where the range ends that begins here."""
        first, end = self._planned
        if first <= self._at < end:
            return min(end, self._at + max(wanted, _PLANNED_BYTES))
        skipped = self._at - (self._start + len(self._data))
        goes_on = self._data and 0 <= skipped < self._window
        self._window = min(2 * self._window, _MOST_BYTES) if goes_on else _LEAST_BYTES
        return self._at + max(wanted, self._window)

    def _range(self, start: int, stop: int) -> bytes:
        try:
            data = self._filesystem.cat_file(self._path, start=start, end=stop)
        except OSError as error:
            if error.errno != errno.EINVAL or start < self._asked_size():
                raise
            return b""  # a range behind the end
        if len(data) < stop - start and start + len(data) < self._asked_size():
            raise IncompleteError(f"{len(data)} bytes came at byte {start} of {self._size}")
        return data

    def _asked_size(self) -> int:
        if self._size is None:
            self._size = int(call(self._url, "read", lambda: self._filesystem.info(self._path))["size"])
        return self._size
