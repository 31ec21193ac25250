"""Access to a store's folder: a local path, or a fsspec URL."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from imagen_core.files import create_durably, write_durably
from imagen_core.store.cache import FileCache
from imagen_core.store.errors import ADVICE, RESTORE, StoreError
from imagen_core.store.records import FileEntry

_REMOTE_BLOCK_BYTES = 1 << 20


class StoreFolder:
    """A local folder or `s3://`, `memory://`, `file://` ... URL.

    Picklable and safe over fork: each process opens its own file system.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
        cache: FileCache | None = None,
    ) -> None:
        """
        Args:
            storage_options: arguments of the fsspec file system.
            cache: local copies of the files that `checked` opens; None opens the originals.
        """
        self.url = os.fspath(url)
        self.storage_options = storage_options or {}
        self._cache = cache
        self._connect()

    def _connect(self) -> None:
        self._pid = os.getpid()
        self._fs: Any = None
        self._root = os.path.abspath(os.path.expanduser(self.url))
        if "://" not in self.url:
            return
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        options = {"use_listings_cache": False, **self.storage_options}  # others may write here
        fs, root = fsspec.core.url_to_fs(self.url, **options)
        self._fs = None if isinstance(fs, LocalFileSystem) else fs
        self._root = root.rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "storage_options": self.storage_options, "cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.url, self.storage_options, self._cache = state["url"], state["storage_options"], state["cache"]
        self._connect()

    @property
    def fs(self) -> Any:
        """The fsspec file system of a remote store, None for a local one."""
        if self._pid != os.getpid():
            self._connect()
        return self._fs

    @property
    def is_local(self) -> bool:
        """Whether the folder is read with plain file operations, without fsspec."""
        return self.fs is None

    def path(self, name: str) -> str:
        """Full path of a file or folder of the store."""
        return f"{self._root}/{name}" if name else self._root

    def exists(self, name: str) -> bool:
        """Whether a file or folder of this name exists."""
        return os.path.exists(self.path(name)) if self.is_local else self.fs.exists(self.path(name))

    def size_bytes(self, name: str) -> int | None:
        """Size of a file; None if it does not exist."""
        try:
            if self.is_local:
                return os.stat(self.path(name)).st_size
            return int(self.fs.info(self.path(name))["size"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def version(self, name: str) -> str | None:
        """What is another one whenever the file was written again; None if it does not exist."""
        try:
            if self.is_local:
                status = os.stat(self.path(name))
                return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
            return self.fs.ukey(self.path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading in binary mode."""
        if self.is_local:
            return open(self.path(name), "rb")
        return self.fs.open(self.path(name), "rb", block_size=_REMOTE_BLOCK_BYTES)

    def read_bytes(self, name: str) -> bytes:
        """All bytes of a file; FileNotFoundError if it does not exist."""
        with self.open(name) as file:
            return file.read()

    def read_checked(self, entry: FileEntry) -> bytes:
        """All bytes of a small file; StoreError if it is missing, or if they are not those that the entry names."""
        try:
            data = self.read_bytes(entry.path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(f"{self.path(entry.path)}: missing; {ADVICE}") from error
        self._compare(entry, len(data), hashlib.sha256(data).hexdigest())
        return data

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file atomically and durably; False if it exists already, which leaves it as it is."""
        if not self.is_local:
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return False
            return True
        return create_durably(Path(self.path(name)), data)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file atomically and durably; it replaces a previous one."""
        if not self.is_local:
            self.fs.pipe_file(self.path(name), data)
            return
        write_durably(Path(self.path(name)), data)

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A local path to write a file to, which replaces the previous one when the block ends."""
        if self.is_local:
            yield Path(self.path(name))  # the caller writes it atomically
            return
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / Path(name).name
            yield local
            self.fs.put_file(str(local), self.path(name))

    def source(self, name: str) -> str | BinaryIO:
        """The argument of the file readers: the path of a local file, or an open remote file."""
        return self.path(name) if self.is_local else self.open(name)

    @contextmanager
    def checked(self, entry: FileEntry, *, every_byte: bool = False) -> Iterator[str | BinaryIO]:
        """`source` of a file that matches the manifest: by size, or with a cache by sha256, as its local copy.

        Args:
            every_byte: compare the sha256 of the original, and use no cache: for whatever copies stored bytes, or
                decides by them what is written.
        Raises:
            StoreError: the file is missing or does not match.
        """
        if every_byte:
            self.check_bytes(entry)
            yield self.source(entry.path)
        elif self._cache is None:
            self.check_size(entry)
            yield self.source(entry.path)
        else:
            name = self.path(entry.path)
            with self._cache.file(entry, name, lambda path: self._download(entry.path, path)) as copy:
                yield copy

    def _download(self, name: str, path: Path) -> None:
        try:
            if self.is_local:
                shutil.copyfile(self.path(name), path)
            else:
                self.fs.get_file(self.path(name), str(path))
        except FileNotFoundError as error:
            raise StoreError(f"{self.path(name)}: missing; {ADVICE}") from error

    def check_size(self, entry: FileEntry) -> None:
        """Raises StoreError if a file is missing or has another size than the manifest says."""
        path, size = self.path(entry.path), self.size_bytes(entry.path)
        if size is None:
            raise StoreError(f"{path}: missing; {ADVICE}")
        if size != entry.bytes:
            raise StoreError(f"{path}: {size} bytes, the manifest says {entry.bytes}; {ADVICE}")

    def check_bytes(self, entry: FileEntry) -> None:
        """Raises StoreError if a file is missing, or if its bytes are not those that the entry names."""
        self.check_size(entry)
        with self.open(entry.path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type] - it has readinto
        self._compare(entry, entry.bytes, digest)

    def _compare(self, entry: FileEntry, size_bytes: int, sha256: str) -> None:
        if (size_bytes, sha256) != (entry.bytes, entry.sha256):
            raise StoreError(
                f"{self.path(entry.path)}: {size_bytes} bytes with sha256 {sha256}, but {entry.bytes} bytes with "
                f"{entry.sha256} were written, so it was changed since; {RESTORE}"
            )

    def walk(self) -> Iterator[str]:
        """Names of all files, relative to the store, sorted within a folder."""
        if not self.is_local:
            for path in sorted(self.fs.find(self._root)):
                yield path[len(self._root) + 1 :]
            return
        for folder, folders, names in os.walk(self._root):
            folders.sort()
            prefix = os.path.relpath(folder, self._root)
            for name in sorted(names):
                yield name if prefix == "." else f"{prefix}/{name}".replace(os.sep, "/")
