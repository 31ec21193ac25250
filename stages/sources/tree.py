"""A folder of files and folders, local or behind any fsspec URL. Names are relative to it, with `/` between."""

import os
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError
from pipeline.storage.disk import takes_no_data
from stages.sources.files import READABLE, open_filesystem

_READS_AT_ONCE = 16
Content = bytes | OSError
Sizes = Callable[[str], int | None]


class Tree:
    """Reads a folder.

    Raises:
        ConfigError: the URL's protocol is unknown.
    """

    def __init__(self, path: str):
        self._filesystem, root = open_filesystem(path, "source.path")
        self.is_local = isinstance(self._filesystem, LocalFileSystem)
        self._root = root.rstrip("/") or ("/" if self.is_local else "")
        self.url = self._filesystem.unstrip_protocol(self._root) if "://" in path else self._root

    def is_folder(self) -> bool:
        self._filesystem.invalidate_cache()  # others write there while this process lives
        return self._filesystem.isdir(self._root)

    def walk(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of every file, each folder sorted. Holds one folder's list at a time.

        Raises:
            ConfigError: a folder may not be read.
        """
        return ((name, size) for name, size, _ in self.walk_with_siblings() if size >= 0)

    def walk_with_siblings(self) -> Iterator[tuple[str, int, Set[str]]]:
        """As `walk`, with the names of all in the folder of each file; a link to nothing is a file of -1 bytes."""
        self._filesystem.invalidate_cache()
        yield from self._walk("", frozenset())

    def _walk(self, folder: str, above: frozenset[str]) -> Iterator[tuple[str, int, Set[str]]]:
        if self.is_local:
            real = os.path.realpath(self._path(folder))
            if real in above:  # a link to a folder above would never end
                return
            above |= {real}
        entries = self._sorted_entries(folder)
        siblings = frozenset(name for name, _ in entries)
        for name, size in entries:
            below = f"{folder}/{name}" if folder else name
            if size is None:
                yield from self._walk(below, above)
            else:
                yield below, size, siblings

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted."""
        return [name for name, size in self._sorted_entries("") if size is None]

    def _sorted_entries(self, folder: str) -> list[tuple[str, int | None]]:
        try:
            return sorted(self._entries(folder))
        except PermissionError as error:
            where = error.filename or self._path(folder)
            raise ConfigError(f"source.path: {where} cannot be read: {error.strerror or error}; {READABLE}") from error

    def _entries(self, folder: str) -> Iterator[tuple[str, int | None]]:
        """Name and bytes of the entries of a folder; None for a folder."""
        path = self._path(folder)
        if self.is_local:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir():
                        yield entry.name, None
                    elif entry.is_file():
                        yield entry.name, entry.stat().st_size
                    elif entry.is_symlink():
                        yield entry.name, -1
            return
        for info in self._filesystem.ls(path, detail=True):
            name = info["name"].rstrip("/").rpartition("/")[2]
            if info["type"] == "directory":
                yield name, None
            elif not info["name"].endswith("/") and info["name"] != path:  # object stores' marks of empty folders
                yield name, info["size"]

    @contextmanager
    def sizes(self) -> Iterator[Sizes]:
        """Gives a file's bytes by its name, None if there is none. Lists a remote folder once, onto disk."""
        if self.is_local:
            yield self.size
            return
        with closing(sqlite3.connect("")) as database:
            database.execute("CREATE TABLE files (name BLOB PRIMARY KEY, bytes INTEGER) WITHOUT ROWID")
            database.executemany(
                "INSERT INTO files VALUES (?, ?)", ((encoded(name), size) for name, size in self.walk())
            )

            def size_of(name: str) -> int | None:
                found = database.execute("SELECT bytes FROM files WHERE name = ?", (encoded(name),)).fetchone()
                return None if found is None else found[0]

            yield size_of

    def size(self, name: str) -> int | None:
        """Bytes of one file, None if there is none."""
        try:
            if self.is_local:
                info = os.stat(self._path(name))
                return info.st_size if stat.S_ISREG(info.st_mode) else None
            found = self._filesystem.info(self._path(name))
            return found["size"] if found["type"] == "file" else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            if self.is_local:  # a name longer than the file system allows
                return None
            raise

    def read(self, choices: Iterable[Sequence[str]]) -> Iterator[Content]:
        """The bytes of the first existing file of each choice of names, in order; a remote folder is read in parallel.

        Yields a FileNotFoundError where there is none, and the error of the local file system where it cannot be read.

        Raises:
            OSError: a remote file cannot be read, though it may exist.
        """
        if self.is_local:
            yield from map(self._read_local, choices)
            return
        choices = iter(choices)
        with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
            while some := list(islice(choices, _READS_AT_ONCE)):
                yield from threads.map(self._read_far, some)

    def _read_local(self, names: Sequence[str]) -> Content:
        name = next((name for name in names if self.size(name) is not None), None)
        if name is None:
            return FileNotFoundError(f"none of {', '.join(names)}")
        try:
            with open(self._path(name), "rb") as file:
                return file.read()
        except OSError as error:
            if takes_no_data(error):  # too many open files are no property of this one
                raise
            return error

    def _read_far(self, names: Sequence[str]) -> Content:
        for name in names:
            try:
                return self._filesystem.cat_file(self._path(name))
            except FileNotFoundError:
                continue
        return FileNotFoundError(f"none of {', '.join(names)}")

    def _path(self, name: str) -> Any:
        return f"{self._root}/{name}" if name else self._root


def encoded(name: str) -> bytes:
    """A file's name for a database: names need not be UTF-8."""
    return name.encode("utf-8", "surrogatepass")


def places(name: str) -> tuple[str, ...]:
    """Where a file that a table of a folder names may be; empty if that would be outside the folder."""
    path = PurePosixPath(name)
    inside = bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts
    return (name, f"images/{name}") if inside else ()
