"""The interface to the place where a run's files are: a local folder or an object store.

On each, a file is either complete or absent. Stages see local paths only: they read copies, and write files that are
published when they are finished.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ConfigError
from pipeline.storage.files import RESTORE, damaged, json_text, parse_json, remove_if_present

T = TypeVar("T")
R = TypeVar("R")
_SEAL = "sha256"


class Storage(ABC):
    """Files by names such as `state/samples/00000.json`. Picklable: workers get a copy.

    Raises, on every call:
        FileNotFoundError: there is no such file.
        MachineError: the object store refuses, or lacks the bucket.
        UnavailableError: it could not be reached for as long as calls are tried again.
    """

    url: str
    """Path or URL, for messages."""
    parallel: int = 1
    """Number of concurrent requests that is worthwhile."""

    def __init__(self) -> None:
        self.owner = ""
        """Begins the names of temporary files, where several processes that do not know each other write here."""
        self.before_change: Callable[[], None] = _allowed
        """Called before each change; raises where this process must not make it. Copies in workers have none."""

    @property
    @abstractmethod
    def local(self) -> Path:
        """The folder of this machine that files are written to, at least temporarily."""

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def read_part(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of a file from byte `start` on; fewer, or none, where it ends before."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Creates or replaces a small file."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Creates a small file; False if it exists, and then it stays unchanged."""

    @abstractmethod
    def version(self, name: str) -> str | None:
        """Says of which version a file is: another one after each write; None if there is no file."""

    @abstractmethod
    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Replaces a small file; False if it is not of this version any more, and then it stays unchanged.

        S3 decides that itself. Elsewhere the version is read just before, so two writers at the same moment may both
        succeed, and the later one remains.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Size of a file in bytes, None if there is none."""

    @abstractmethod
    def names(self, folder: str) -> Iterator[str]:
        """Names of the files directly in a folder, without the folder, in no order."""

    def listing(self, folder: str) -> Iterator[tuple[str, int, str]]:
        """Name, bytes and version of each file directly in a folder, in no order; a file that was written again has
        another version."""
        raise NotImplementedError

    @abstractmethod
    def entries(self) -> Iterator[tuple[str, bool]]:
        """Name of everything directly in this folder, and whether it is a folder; nothing if there is no folder."""

    @abstractmethod
    def walk(self) -> Iterator[str]:
        """Names of all files, sorted within a folder."""

    @abstractmethod
    def write_file(self, name: str, local: Path) -> None:
        """Creates or replaces a file with the content of a local file, which stays.

        Raises:
            FileNotFoundError: there is no such local file.
        """

    @abstractmethod
    def delete(self, name: str, *, durably: bool = False) -> None:
        """Deletes a file if it exists.

        Args:
            durably: before what follows; else a loss of power may bring it back.
        """

    def delete_all(self, names: Sequence[str]) -> None:
        """Deletes files that may be gone, in no order; on an object store many per request."""
        for name in names:
            self.delete(name)

    @abstractmethod
    def delete_folder(self, name: str) -> None:
        """Deletes a folder with its content, if it exists."""

    @abstractmethod
    def copy(self, name: str) -> Path:
        """A local path to read the file from; to be released with `release`."""

    @abstractmethod
    def release(self, copy: Path) -> None:
        """Releases a path from `copy`."""

    @abstractmethod
    def new_file(self, name: str) -> Path:
        """A local path, private to the caller, to write the file to before it is published."""

    @abstractmethod
    def publish(self, local: Path, name: str) -> None:
        """Makes a finished file from `new_file` visible under its name, durably and atomically."""

    @abstractmethod
    def new_folder(self) -> Path:
        """An empty local folder for temporary files; the caller deletes it."""

    @abstractmethod
    def clean(self, folder: str = "") -> int:
        """Deletes unfinished files of killed processes, in all folders or below one; returns their number."""

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write a file to; published at the end of the block, unless that raises."""
        local = self.new_file(name)
        try:
            yield local
            self.publish(local, name)
        finally:
            remove_if_present(local)

    def read_lines(self, name: str) -> Iterator[str]:
        """The lines of a text file, streamed; bytes that are not UTF-8 as U+FFFD."""
        copy = self.copy(name)
        try:
            with copy.open(encoding="utf-8", errors="replace") as lines:
                yield from lines
        finally:
            self.release(copy)

    def read_json_lines(self, name: str, remedy: str = RESTORE) -> Iterator[Any]:
        """The values in a file of one JSON value per line, streamed.

        Raises:
            ConfigError: a line is damaged; names it. Or, after the last value: the file is not the one that
                `write_json_lines` wrote under this name.
        """
        seal, number, hasher = None, 0, _line_hasher(name)
        for number, line in enumerate(self.read_lines(name), start=1):
            value = parse_json(line.encode(), f"{self.url}/{name} line {number}", remedy)
            if number == 1 and isinstance(value, dict) and len(value) == 1:
                seal = value.get(_SEAL, "")
            else:
                hasher.update(line.encode())
                yield value
        if not number or seal not in (None, hasher.hexdigest()):
            raise damaged(f"{self.url}/{name}", "was changed since it was written" if number else "is empty", remedy)

    def write_json_lines(self, name: str, values: Iterable[object]) -> None:
        """Creates or replaces a file for `read_json_lines`: before the values it has one line with their digest.

        The name counts as well, so that files which took each other's place are found.
        """
        hasher = _line_hasher(name)
        with self.writing(name) as path, path.open("wb") as file:
            file.write(_seal_line(hasher))  # as long as the last one
            for value in values:
                line = json.dumps(value).encode() + b"\n"
                hasher.update(line)
                file.write(line)
            file.seek(0)
            file.write(_seal_line(hasher))

    def read_json(self, name: str, remedy: str = RESTORE) -> Any:
        """The value in a JSON file, None if there is none.

        Raises:
            ConfigError: the file is damaged; names it and the remedy.
        """
        try:
            data = self.read(name)
        except FileNotFoundError:
            return None
        return parse_json(data, f"{self.url}/{name}", remedy)

    def read_json_if_whole(self, name: str) -> Any:
        """The same for a file that is written anew: None also if it is damaged."""
        try:
            return self.read_json(name)
        except ConfigError:
            return None

    def write_json(self, name: str, value: object) -> None:
        self.write_text(name, json_text(value))

    def write_text(self, name: str, text: str) -> None:
        self.write(name, text.encode("utf-8", "backslashreplace"))

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`function` of each item, in order; on an object store a bounded number of calls runs concurrently."""
        return parallel_map(function, items, self.parallel)


def parallel_map(function: Callable[[T], R], items: Iterable[T], parallel: int) -> Iterator[R]:
    """`function` of each item, in order, computed by threads, at most 2 x `parallel` items ahead."""
    if parallel == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(parallel, thread_name_prefix="storage") as threads:
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(threads.submit(function, item))
                if len(ahead) > 2 * parallel:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


class BackgroundTasks:
    """Small tasks without a result, such as deletions: run at once on a local folder, in threads on an object store.

    The error of a task is raised by a later `do` or `finish`.
    """

    def __init__(self, storage: Storage):
        self._most = 4 * storage.parallel
        self._threads = ThreadPoolExecutor(storage.parallel) if storage.parallel > 1 else None
        self._pending: deque[Future[None]] = deque()

    def do(self, function: Callable[..., None], *arguments: object) -> None:
        if self._threads is None:
            function(*arguments)
            return
        self._pending.append(self._threads.submit(function, *arguments))
        while self._pending[0].done() or len(self._pending) > self._most:
            self._pending.popleft().result()
            if not self._pending:
                return

    def finish(self) -> None:
        """Waits for all tasks."""
        while self._pending:
            self._pending.popleft().result()


def _allowed() -> None:
    """Nothing forbids a change."""


def _line_hasher(name: str) -> "hashlib._Hash":
    return hashlib.sha256(name.encode() + b"\n")


def _seal_line(hasher: "hashlib._Hash") -> bytes:
    return json.dumps({_SEAL: hasher.hexdigest()}).encode() + b"\n"
