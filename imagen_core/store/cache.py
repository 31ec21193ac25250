"""A bounded folder of local copies of a store's files.

fsspec's `filecache` keeps complete files too, but neither limits their size nor checks what it downloaded.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from imagen_core.files import file_digest, fsync_path
from imagen_core.store.errors import ADVICE, StoreError
from imagen_core.store.records import FileEntry

DEFAULT_CACHE_BYTES = 32 << 30
_PARTIAL = ".part"
_Version = tuple[int, int, int]
"""Size, modification time and inode of a file."""


class FileCache:
    """Copies named by their sha256; the least recently used ones are removed first. Processes may share the folder.

    A file is downloaded under another name, checked against the manifest, synced and renamed: a file with its final
    name is complete. Each process compares a copy with its name when it first opens it, and when the file has changed
    since; a copy that does not match is downloaded again. A file that is being downloaded or opened holds the lock of
    its first two digits, and no file is removed without that lock. A removed file that some process still has open
    takes disk space until it is closed.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        """
        Args:
            folder: made if it does not exist.
            max_bytes: size of all copies; the file in use may exceed it.
        Raises:
            ValueError: max_bytes is below 1.
        """
        if max_bytes < 1:
            raise ValueError(f"cache_bytes must be 1 or more (got {max_bytes})")
        self._folder = Path(folder).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._compared: dict[str, _Version] = {}

    @contextmanager
    def file(self, entry: FileEntry, name: str, download: Callable[[Path], None]) -> Iterator[str]:
        """The path of a complete copy, which stays at least until the `with` block ends.

        Args:
            entry: size and sha256 of the file, from the manifest.
            name: of the original, for error messages.
            download: writes the original to a path.
        Raises:
            StoreError: size or sha256 of the download are not the manifest's.
        """
        path = self._folder / entry.sha256
        with self._lock(path):
            if self._is_intact(path, entry):
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # its last use
            else:
                partial = path.with_suffix(_PARTIAL)
                download(partial)
                _check(partial, entry, name)
                os.replace(partial, path)
                self._compared[entry.sha256] = _version(path)
                self._evict(path)
            yield str(path)

    def _is_intact(self, path: Path, entry: FileEntry) -> bool:
        """Whether there is a copy with the bytes that its name says; they are read once per process and version."""
        try:
            version = _version(path)
        except FileNotFoundError:
            return False
        if version[0] != entry.bytes:
            return False
        if self._compared.get(entry.sha256) != version:
            if file_digest(path) != entry.sha256:
                return False
            self._compared[entry.sha256] = version
        return True

    def _lock(self, path: Path, timeout_s: float = -1) -> FileLock:
        return FileLock(self._folder / f".{path.name[:2]}.lock", timeout=timeout_s, poll_interval=0.005)

    def _evict(self, keep: Path) -> None:
        """Remove the least recently used files, including leftovers of killed downloads, until the rest fits."""
        found = []
        for entry in os.scandir(self._folder):
            if not entry.name.startswith("."):
                try:
                    found.append((entry.stat().st_atime_ns, entry.stat().st_size, Path(entry.path)))
                except FileNotFoundError:  # removed by another process
                    continue
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max_bytes:
                return
            if path == keep:
                continue
            if path.name[:2] == keep.name[:2]:  # our own lock
                path.unlink(missing_ok=True)
            else:
                try:
                    with self._lock(path, timeout_s=0):
                        path.unlink(missing_ok=True)
                except Timeout:  # in use
                    continue
            total -= size


def _version(path: Path) -> _Version:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _check(path: Path, entry: FileEntry, name: str) -> None:
    """Sync a downloaded file; if it is not the manifest's, remove it and raise StoreError."""
    digest, size = file_digest(path), path.stat().st_size
    fsync_path(path)
    if (size, digest) != (entry.bytes, entry.sha256):
        path.unlink()
        raise StoreError(
            f"{name}: downloaded {size} bytes with sha256 {digest}, the manifest says {entry.bytes} bytes with "
            f"{entry.sha256}; {ADVICE}"
        )
