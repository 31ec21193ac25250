"""Access to a store's folder: a local path, or a fsspec URL."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from imagen_core.far import FarFile, StorageError, call, create, download, open_filesystem, read_file
from imagen_core.files import create_durably, file_digest, write_durably
from imagen_core.store.cache import FileCache
from imagen_core.store.errors import ADVICE, RESTORE, StoreError
from imagen_core.store.records import FileEntry

_REMOTE_BLOCK_BYTES = 1 << 20


class StoreFolder:
    """A local folder or `s3://`, `memory://`, `file://` ... URL.

    Picklable and safe over fork: each process opens its own file system. Calls to a remote one are tried again while
    what failed may pass; each of them raises StorageError where it did not, or where the storage refuses.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
        cache: FileCache | None = None,
        scratch: Path | None = None,
    ) -> None:
        """
        Args:
            storage_options: arguments of the fsspec file system.
            cache: local copies of the files that `checked` opens; None opens the originals.
            scratch: folder for temporary copies of remote files; default TMPDIR, where those of a killed process stay.
        """
        self.url = os.fspath(url)
        self.storage_options = storage_options or {}
        self.before_change: Callable[[], None] = _allowed
        """Called before each change; raises where this process must not make it. Not in copies of other processes."""
        self._cache, self._scratch = cache, scratch
        self._connect()

    def _connect(self) -> None:
        self._pid = os.getpid()
        self._fs: Any = None
        self._root = os.path.abspath(os.path.expanduser(self.url))
        if "://" not in self.url:
            return
        from fsspec.implementations.local import LocalFileSystem

        options = {"use_listings_cache": False, **self.storage_options}  # others may write here
        fs, root = open_filesystem(self.url, **options)
        self._fs = None if isinstance(fs, LocalFileSystem) else fs
        self._root = root.rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "storage_options": self.storage_options,
            "cache": self._cache,
            "scratch": self._scratch,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

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
        """Full path or URL of a file or folder of the store."""
        root = self._root if self.is_local else self.url.rstrip("/")
        return f"{root}/{name}" if name else root

    def _far(self, name: str) -> tuple[Any, str, str]:
        """File system, path there and URL, as calls to storage take them."""
        return self.fs, f"{self._root}/{name}" if name else self._root, self.path(name)

    def _info(self, name: str) -> dict[str, Any] | None:
        """What a remote file system knows of a file or folder; None if there is none."""
        fs, path, url = self._far(name)
        try:
            return call(url, "read", lambda: fs.info(path))
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        """Whether a file or folder of this name exists."""
        return os.path.exists(self.path(name)) if self.is_local else self._info(name) is not None

    def size_bytes(self, name: str) -> int | None:
        """Size of a file; None if it does not exist."""
        try:
            if self.is_local:
                return os.stat(self.path(name)).st_size
            info = self._info(name)
            return None if info is None else int(info["size"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def version(self, name: str) -> str | None:
        """What is another one whenever the file was written again; None if it does not exist."""
        try:
            if self.is_local:
                status = os.stat(self.path(name))
                return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
            fs, path, url = self._far(name)
            return call(url, "read", lambda: fs.ukey(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading in binary mode."""
        if self.is_local:
            return open(self.path(name), "rb")
        return cast(BinaryIO, FarFile(*self._far(name), block_size=_REMOTE_BLOCK_BYTES))

    def read_bytes(self, name: str, size_bytes: int | None = None) -> bytes:
        """All bytes of a file, of which there should be so many; FileNotFoundError if it does not exist."""
        if not self.is_local:
            with _damage_told():
                return read_file(*self._far(name), size_bytes)
        with self.open(name) as file:
            return file.read()

    def read_checked(self, entry: FileEntry) -> bytes:
        """All bytes of a small file; StoreError if it is missing, or if they are not those that the entry names."""
        try:
            data = self.read_bytes(entry.path, entry.bytes)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(f"{self.path(entry.path)}: missing; {ADVICE}") from error
        self._compare(entry, len(data), hashlib.sha256(data).hexdigest())
        return data

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file atomically and durably; False if it exists already with other bytes, which stay.

        A local one that exists is False with the same bytes too.
        """
        self.before_change()
        if not self.is_local:
            return create(*self._far(name), data)
        return create_durably(Path(self.path(name)), data)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file atomically and durably; it replaces a previous one."""
        self.before_change()
        if self.is_local:
            write_durably(Path(self.path(name)), data)
        else:
            fs, path, url = self._far(name)
            call(url, "written", lambda: fs.pipe_file(path, data), self.before_change)

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A local path to write a file to, which replaces the previous one when the block ends."""
        self.before_change()
        if self.is_local:
            yield Path(self.path(name))  # the caller writes it atomically
            return
        with tempfile.TemporaryDirectory(dir=self._scratch) as scratch:
            local = Path(scratch) / Path(name).name
            yield local
            fs, path, url = self._far(name)
            call(url, "written", lambda: fs.put_file(str(local), path), self.before_change)

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
        if every_byte and not self.is_local:
            with self._proven_copy(entry) as copy:
                yield copy
        elif every_byte:
            self.check_bytes(entry)
            yield self.source(entry.path)
        elif self._cache is None:
            self.check_size(entry)
            yield self.source(entry.path)
        else:
            name = self.path(entry.path)
            with self._cache.file(entry, name, lambda path: self._fetch(entry, path)) as copy:
                yield copy

    @contextmanager
    def _proven_copy(self, entry: FileEntry) -> Iterator[str]:
        """The path of a temporary copy of a remote file that has the bytes which the entry names."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as scratch:
            copy = Path(scratch) / Path(entry.path).name
            self._fetch(entry, copy)
            self._compare(entry, copy.stat().st_size, file_digest(copy))
            yield str(copy)

    def _fetch(self, entry: FileEntry, copy: Path) -> None:
        try:
            self.fetch(entry, copy)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(f"{self.path(entry.path)}: missing; {ADVICE}") from error

    def fetch(self, entry: FileEntry, copy: Path) -> None:
        """Copy a file to a local path, whatever its bytes are.

        Raises:
            FileNotFoundError: it does not exist.
            StoreError: its bytes do not fit the checksum that a remote storage has of them.
        """
        if self.is_local:
            shutil.copyfile(self.path(entry.path), copy)
        else:
            with _damage_told():
                download(*self._far(entry.path), copy, entry.bytes)

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
            fs, root, url = self._far("")
            for path in sorted(call(url, "listed", lambda: fs.find(root))):
                yield path[len(self._root) + 1 :]
            return
        for folder, folders, names in os.walk(self._root):
            folders.sort()
            prefix = os.path.relpath(folder, self._root)
            for name in sorted(names):
                yield name if prefix == "." else f"{prefix}/{name}".replace(os.sep, "/")


@contextmanager
def _damage_told() -> Iterator[None]:
    """Turns what a remote storage says of a file's bytes into an error of the store."""
    try:
        yield
    except StorageError as error:
        if not error.damaged:
            raise
        raise StoreError(str(error)) from error


def _allowed() -> None:
    """Nothing forbids a change."""
