"""Files behind URLs: file systems, and a file that is read with patience."""

import inspect
import io
import logging
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from imagen_core.far.calls import IncompleteError, call

log = logging.getLogger(__name__)


def open_filesystem(url: str, **options: Any) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path there; nothing is read yet.

    Args:
        options: of the file system. The user's fsspec configuration comes before our timeouts, and these before it.
    Raises:
        ImportError: it needs a package that is not installed.
        ValueError: the protocol is unknown.
    """
    import fsspec
    from fsspec.config import conf

    protocol = url.partition("://")[0]
    defaults: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        defaults["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard"}}
    defaults = {key: value for key, value in defaults.items() if key not in conf.get(protocol, {})}
    filesystem, path = fsspec.core.url_to_fs(url, **{**defaults, **options})
    if getattr(filesystem, "async_impl", False) and filesystem.loop is not None:
        filesystem.loop.set_exception_handler(_abandoned)
    return filesystem, path


def _abandoned(_: object, context: dict[str, Any]) -> None:
    """Takes an error that nobody waits for: of a connection whose request was given up, and made again."""
    log.debug("%s: %s", context.get("message"), context.get("exception"))


def read_file(filesystem: Any, path: str, url: str, size_bytes: int | None = None) -> bytes:
    """All bytes of a file.

    Args:
        url: of the file, for messages.
        size_bytes: how many there should be; if fewer come and the file has more, it is read again.
    Raises:
        FileNotFoundError, StorageError: see `call`.
    """

    def read() -> bytes:
        data = _whole(filesystem, path)
        _check_whole(filesystem, path, len(data), size_bytes)
        return data

    return call(url, "read", read)


def _whole(filesystem: Any, path: str) -> bytes:
    return filesystem.cat_file(path, **_in_one_request(type(filesystem)))


@cache
def _in_one_request(kind: Any) -> dict[str, int]:
    """Options of `cat_file`: s3fs asks for the size first, which is a second request, to read large files in parts. A
    range would not be compared with its checksum."""
    parameters = inspect.signature(getattr(kind, "_cat_file", kind.cat_file)).parameters
    return {"max_concurrency": 1} if "max_concurrency" in parameters else {}


def create(filesystem: Any, path: str, url: str, data: bytes) -> bool:
    """Writes a small file that is not there yet; False if there is one with other bytes, which stays.

    A server may carry a request out and answer that it failed. Then another try finds the file, with our bytes.
    """
    try:
        call(url, "written", lambda: filesystem.pipe_file(path, data, mode="create"))
    except FileExistsError:
        return read_file(filesystem, path, url) == data
    return True


def download(filesystem: Any, path: str, url: str, local: Path, size_bytes: int | None = None) -> None:
    """Copies a file to a local path, which a failure leaves absent; see `read_file`."""
    from fsspec.callbacks import Callback

    def copy() -> None:
        told = Callback()
        filesystem.get_file(path, str(local), callback=told)
        found = local.stat().st_size
        if told.size is not None and found < told.size:
            raise IncompleteError(f"{found} of {told.size} bytes came")
        _check_whole(filesystem, path, found, size_bytes)

    try:
        call(url, "read", copy)
    except BaseException:
        local.unlink(missing_ok=True)
        raise


def _check_whole(filesystem: Any, path: str, found: int, expected: int | None) -> None:
    """Raises IncompleteError if fewer bytes came than the file has; asks only if they are fewer than expected."""
    if expected is not None and found < expected:
        there = int(filesystem.info(path)["size"])
        if found < there:
            raise IncompleteError(f"{found} of {there} bytes came")


class FarFile(io.RawIOBase):
    """A file behind a URL, read at any place.

    What breaks is opened again, and reading goes on where it was. Not to be used by several threads at once.

    Raises, on opening and reading:
        FileNotFoundError, StorageError: see `call`.
    """

    def __init__(self, filesystem: Any, path: str, url: str, **options: Any) -> None:
        """
        Args:
            url: for messages.
            options: of `open` of the file system, such as `block_size`.
        """
        self._filesystem, self._path, self._url, self._options = filesystem, path, url, options
        self._at = 0
        self._file: Any = call(url, "read", self._opened)
        self._size: int | None = getattr(self._file, "size", None)
        """None of a server without ranges: the file is a stream."""

    def _opened(self) -> Any:
        return self._filesystem.open(self._path, "rb", **self._options)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file is None or bool(self._file.seekable())

    def read(self, size: int | None = -1) -> bytes:
        data = call(self._url, "read", lambda: self._read(-1 if size is None else size))
        self._at += len(data)
        return data

    def _read(self, size: int) -> bytes:
        try:
            self._go_to_place()
            data = self._file.read(size)
            rest = 0 if self._size is None else max(0, self._size - self._at)
            if len(data) < (rest if size < 0 else min(size, rest)):
                raise IncompleteError(f"{len(data)} bytes came at byte {self._at} of {self._size}")
        except Exception:
            self._release()  # it may hold half an answer
            raise
        return data

    def _go_to_place(self) -> None:
        fresh = self._file is None
        if fresh:
            self._file = self._opened()
        if self._size is not None:
            self._file.seek(self._at)
        elif fresh:
            left = self._at
            while left and (skipped := len(self._file.read(min(left, 1 << 20)))):
                left -= skipped
            if left:
                raise IncompleteError(f"it ended {left} bytes before byte {self._at}")

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self._size is None:
            if (offset, whence) not in ((self._at, io.SEEK_SET), (0, io.SEEK_CUR)):
                raise ValueError(
                    f"{self._url}: its server has no ranges, so it can only be read from its beginning on"
                )
            return self._at
        place = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        if place < 0:
            raise ValueError(f"{self._url}: place {place} is before its beginning")
        self._at = place
        return place

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if not self.closed:
            self._release()
        super().close()

    def _release(self) -> None:
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            with suppress(Exception):
                file.close()
