"""Faults at the points where a process writes: it ends there, the disk is full or broken, or the power goes.

`FaultPoints` takes the place of Python's `open` and of the functions of `os` that change a folder, in this process and
for good, so it belongs into a forked child. A point is: a file opened for writing, its first write, a sync, a rename,
a link, an unlink, a folder made or removed, and, for libraries that write without Python (Parquet, safetensors), the
call that opens and the call that closes a file.

A loss of power takes what was not synced: the content of a file since its last sync, and names (new, renamed, deleted)
since the last sync of their folder. Names are lost from the newest on, down to one drawn by chance, as file systems
with a journal lose them.
"""

import builtins
import errno
import io
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet
import safetensors.numpy
import safetensors.torch

KINDS = ("exit", "full", "eio", "power")
EXIT_CODE = 137
"""Of a process that a fault has ended, as of one that was killed."""

_REAL: dict[str, Any] = {
    name: getattr(os, name)
    for name in ("open", "close", "fsync", "replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir", "stat")
}
_OPEN = io.open
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_NEEDS_ROOM = ("open", "write", "mkdir", "link", "close", "fsync")


class FaultPoints:
    """Counts the points of this process below some folders, and makes one of them a fault.

    Attributes:
        labels: operation and path of each point so far.
    """

    def __init__(self, roots: list[Path], shadow: Path, kind: str = "", at: int = -1, seed: int = 0):
        """
        Args:
            roots: folders that count; files elsewhere are left alone.
            shadow: an empty folder on the same file system for what was replaced or deleted.
            kind: one of KINDS, or "" to count only.
            at: number of the point, from 0, that is the fault.
            seed: of what a loss of power takes.
        """
        self.labels: list[str] = []
        self._roots = [f"{root}/" for root in roots]
        self._shadow, self._kind, self._at = shadow, kind, at
        self._chance = random.Random(seed)
        self._full = False
        self._names: list[tuple[set[str], Callable[[], None]]] = []
        """Changes of names whose folders were not synced yet, each with what takes it back."""
        self._durable = {key: size for root in roots for key, size in _files(root)}
        """Inode -> bytes and time of change when its content was last safe."""
        self._kept = 0

    def install(self) -> None:
        """Takes the place of the functions that write."""
        builtins.open = io.open = self._open  # type: ignore[assignment]
        for name in ("replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir", "fsync"):
            setattr(os, name, getattr(self, f"_{name}"))
        os.open = self._os_open  # type: ignore[assignment]
        shutil._use_fd_functions = False  # type: ignore[attr-defined] - rmtree then passes whole paths
        opening, closing = pyarrow.parquet.ParquetWriter.__init__, pyarrow.parquet.ParquetWriter.close

        def open_parquet(writer: Any, where: Any, *arguments: Any, **options: Any) -> None:
            new = self._creates("open", where)
            opening(writer, where, *arguments, **options)
            new()
            writer.written_to = where

        def close_parquet(writer: Any) -> None:
            if writer.is_open:
                self._point("close", getattr(writer, "written_to", ""))
            closing(writer)

        pyarrow.parquet.ParquetWriter.__init__ = open_parquet
        pyarrow.parquet.ParquetWriter.close = close_parquet
        for module in (safetensors.numpy, safetensors.torch):
            setattr(module, "serialize_file", self._serialize_file(module.serialize_file))  # noqa: B010

    def _serialize_file(self, real: Callable[..., None]) -> Callable[..., None]:
        def serialize_file(tensors: Any, filename: Any, *arguments: Any, **options: Any) -> None:
            new = self._creates("open", filename)
            real(tensors, filename, *arguments, **options)
            new()

        return serialize_file

    # The points

    def _counts(self, path: Any) -> bool:
        return f"{_text(path)}/".startswith(tuple(self._roots))

    def _point(self, operation: str, path: Any, partly: Callable[[], object] = lambda: None) -> None:
        """Counts a point; at the one that is the fault, ends the process or raises.

        Args:
            partly: does the part of the operation that happens before the fault.
        """
        if not self._counts(path):
            return
        number = len(self.labels)
        self.labels.append(f"{operation} {_text(path)}")
        if self._full and operation in _NEEDS_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), _text(path))
        if number != self._at:
            return
        if self._kind == "exit":
            partly()
            os._exit(EXIT_CODE)
        if self._kind == "power":
            partly()
            self._lose_power()
        if self._kind == "eio":
            raise OSError(errno.EIO, os.strerror(errno.EIO), _text(path))
        if self._kind == "full":
            self._full = True
            if operation in _NEEDS_ROOM:
                partly()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), _text(path))

    def _creates(self, operation: str, path: Any) -> Callable[[], None]:
        """A point that may make a file; the result is to be called once it is made."""
        self._point(operation, path)
        if not self._counts(path) or os.path.lexists(path):
            return lambda: None
        return lambda: self._named(_text(path), take_back=lambda: _delete(_text(path)))

    def _named(self, *paths: str, take_back: Callable[[], None]) -> None:
        if self._kind == "power":
            self._names.append(({os.path.dirname(path) for path in paths}, take_back))

    def _keep(self, path: str) -> str | None:
        """A second name for a file that is about to be replaced or deleted."""
        if self._kind != "power" or not os.path.isfile(path):
            return None
        self._kept += 1
        kept = f"{self._shadow}/{self._kept}"
        _REAL["link"](path, kept)
        return kept

    # In place of Python's functions

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+") or not self._counts(file):
            return _OPEN(file, mode, buffering, *text, **options)
        opener = options.pop("opener", None) or (text[4] if len(text) > 4 else None)
        new = (lambda: None) if opener else self._creates("open", file)
        raw = _WatchedFile(self, file, mode.replace("b", "").replace("t", ""), opener)
        new()
        if buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        names = ("encoding", "errors", "newline")
        options = {**dict(zip(names, text, strict=False)), **{k: v for k, v in options.items() if k in names}}
        return io.TextIOWrapper(buffered, **options)

    def _os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None or not flags & _WRITES:
            return _REAL["open"](path, flags, mode, dir_fd=dir_fd)
        new = self._creates("open", path)
        descriptor = _REAL["open"](path, flags, mode)
        new()
        return descriptor

    def _fsync(self, file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._point("fsync", path)
        if self._kind != "power":
            return  # nothing is lost, so nothing has to wait for the disk
        status = os.fstat(descriptor)
        if not stat.S_ISDIR(status.st_mode):
            self._durable[status.st_ino] = (status.st_size, status.st_mtime_ns)
            return
        for folders, _ in self._names:
            folders.discard(path)
        self._names = [entry for entry in self._names if entry[0]]

    def _replace(self, source: Any, target: Any, **options: Any) -> None:
        self._point("rename", target)
        old, before, kept = _text(source), _text(target), self._keep(_text(target))
        _REAL["replace"](source, target, **options)

        def take_back() -> None:
            if os.path.lexists(before):
                _REAL["replace"](before, old)
            if kept is not None:
                _REAL["replace"](kept, before)

        if self._counts(target):
            self._named(old, before, take_back=take_back)

    _rename = _replace

    def _link(self, source: Any, target: Any, **options: Any) -> None:
        self._point("link", target)
        _REAL["link"](source, target, **options)
        if self._counts(target):
            self._named(_text(target), take_back=lambda: _delete(_text(target)))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        if dir_fd is not None:
            _REAL["unlink"](path, dir_fd=dir_fd)
            return
        if not os.path.lexists(path):
            _REAL["unlink"](path)
        self._point("unlink", path)
        name, kept = _text(path), self._keep(_text(path)) if self._counts(path) else None
        _REAL["unlink"](path)
        if kept is not None:
            self._named(name, take_back=lambda: _put_back(kept, name))

    _remove = _unlink

    def _mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        if os.path.lexists(path) or not os.path.isdir(os.path.dirname(_text(path))):
            _REAL["mkdir"](path, mode, **options)  # raises
        self._point("mkdir", path)
        _REAL["mkdir"](path, mode, **options)
        if self._counts(path):
            name = _text(path)
            self._named(name, take_back=lambda: shutil.rmtree(name, ignore_errors=True))

    def _rmdir(self, path: Any, **options: Any) -> None:
        self._point("rmdir", path)
        _REAL["rmdir"](path, **options)
        if self._counts(path):
            name = _text(path)
            self._named(name, take_back=lambda: os.makedirs(name, exist_ok=True))

    # A loss of power

    def _lose_power(self) -> NoReturn:
        self._point = lambda *_, **__: None  # type: ignore[method-assign] - nothing counts any more
        for root in self._roots:
            for inode, (size, changed), path in _entries(Path(root)):
                safe = self._durable.get(inode)
                if safe == (size, changed) or (safe is None and not size):
                    continue
                left = safe[0] if safe is not None and safe[0] < size else 0
                os.truncate(path, left if safe is not None else self._chance.choice([0, size // 2]))
        names, self._names = self._names, []
        lost = self._chance.choice([0, len(names), self._chance.randint(0, len(names))])
        for _, take_back in reversed(names[len(names) - lost :]):
            take_back()
        os._exit(EXIT_CODE)


class _WatchedFile(io.FileIO):
    """A file whose first write is a point."""

    def __init__(self, points: FaultPoints, path: Any, mode: str, opener: Any):
        super().__init__(path, mode, opener=opener)
        self._points, self._untouched = points, True

    def write(self, data: Any) -> int:
        if self._untouched:
            self._untouched = False
            half = memoryview(data).cast("B")[: len(data) // 2]
            self._points._point("write", self.name, lambda: super(_WatchedFile, self).write(half))
        elif self._points._full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        return super().write(data)


def _text(path: Any) -> str:
    try:
        return os.path.abspath(os.fsdecode(path))
    except TypeError:  # an open file, or a descriptor
        return ""


def _entries(root: Path) -> list[tuple[int, tuple[int, int], str]]:
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = f"{folder}/{name}"
            status = os.lstat(path)
            found.append((status.st_ino, (status.st_size, status.st_mtime_ns), path))
    return found


def _files(root: Path) -> list[tuple[int, tuple[int, int]]]:
    return [(inode, state) for inode, state, _ in _entries(root)]


def _delete(path: str) -> None:
    if os.path.lexists(path) and not os.path.isdir(path):
        _REAL["unlink"](path)


def _put_back(kept: str, path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    _REAL["replace"](kept, path)
