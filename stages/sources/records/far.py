"""Files behind URLs: what their drivers raise, which is almost anything, becomes one kind of error."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import fsspec

from pipeline.errors import ConfigError, MachineError, PipelineError, first_line

_LOCAL = ("file", "local", "memory")
_NOT_FOUND = (404, 410)


class Unreachable(Exception):
    """A file behind a URL cannot be reached, or its server refuses. Another try may succeed."""


def is_far(path: str) -> bool:
    """True for a URL of another machine."""
    protocol, separator, _ = path.partition("://")
    return bool(separator) and protocol not in _LOCAL


def open_file(path: str) -> BinaryIO:
    """A file, local or behind any fsspec URL, as bytes.

    Raises:
        OSError: a local file cannot be opened; FileNotFoundError: there is none, also behind a URL.
        Unreachable: also where the file is read.
    """
    if not is_far(path):
        return cast(BinaryIO, cast(Any, fsspec.open(path, "rb")).open())
    with _told(path):
        return cast(BinaryIO, _FarFile(cast(Any, fsspec.open(path, "rb")).open(), path))


class _FarFile(io.RawIOBase):
    """A file behind a URL, whose errors are `Unreachable`."""

    def __init__(self, file: Any, path: str):
        self._file, self._path = file, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def read(self, size: int = -1) -> bytes:
        with _told(self._path):
            return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _told(self._path):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def reaching(path: str) -> Iterator[None]:
    """What the driver of a run reads of a source.

    Args:
        path: `source.path`.

    Raises:
        ConfigError: a URL leads to nothing.
        MachineError: a URL cannot be reached, or its server refuses.
    """
    try:
        with _told(path):
            yield
    except Unreachable as error:
        raise MachineError(
            f"source.path: {error}; check the address, the network and what this user may read, and run the same "
            "command again"
        ) from error
    except FileNotFoundError as error:
        if not is_far(path):
            raise
        raise ConfigError(f"source.path: {error.args[-1] if error.args else path} does not exist; check it") from error


@contextmanager
def _told(path: str) -> Iterator[None]:
    try:
        yield
    except (PipelineError, Unreachable):
        raise
    except Exception as error:
        if not is_far(path):
            raise
        reason = _reason(error)
        if reason is None:
            raise
        raise Unreachable(f"{path} cannot be read: {type(reason).__name__}: {first_line(reason)}") from error


def _reason(error: BaseException) -> BaseException | None:
    """The error behind the FileNotFoundErrors that fsspec raises for everything; None if nothing is there."""
    found: BaseException | None = error
    while isinstance(found, FileNotFoundError):
        found = found.__cause__
    return None if getattr(found, "status", None) in _NOT_FOUND else found
