"""Compares the bytes of a store's files with the manifest; of a remote store with local copies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagen_core.files import file_digest
from imagen_core.store.errors import StoreError
from imagen_core.store.folder import StoreFolder
from imagen_core.store.records import FileEntry
from imagen_core.store.verification.report import Problem, VerifyReport


class FileChecks:
    """What `verify_store` does with any file."""

    def __init__(
        self,
        folder: StoreFolder,
        report: VerifyReport,
        on_file: Callable[[str, int], None] | None,
        scratch: Path,
    ) -> None:
        self._folder, self._report, self._on_file = folder, report, on_file
        self._scratch = scratch
        self._copies: dict[str, Path] = {}
        """Of a remote store: the files of the shard, so that each is fetched once, and what was compared is read."""

    def count(self, name: str, size_bytes: int) -> None:
        self._report.files_checked += 1
        self._report.bytes_checked += size_bytes
        if self._on_file:
            self._on_file(name, size_bytes)

    def _bad(self, name: str, message: str) -> None:
        self._report.problems.append(Problem(name, message))

    def _source(self, entry: FileEntry) -> Any:
        copy = self._copies.get(entry.path)
        return self._folder.source(entry.path) if copy is None else str(copy)

    def _content(self, entry: FileEntry) -> bytes:
        copy = self._copies.get(entry.path)
        return self._folder.read_bytes(entry.path) if copy is None else copy.read_bytes()

    def _size_and_digest(self, entry: FileEntry) -> tuple[int, str]:
        """Raises FileNotFoundError or NotADirectoryError if there is no such file."""
        path = Path(self._folder.path(entry.path))
        if not self._folder.is_local:
            path = self._scratch / f"{len(self._copies)}-{path.name}"
            self._folder.fetch(entry, path)
            self._copies[entry.path] = path
        return path.stat().st_size, file_digest(path)

    def _bytes(self, entry: FileEntry) -> bool:
        try:
            size, digest = self._size_and_digest(entry)
        except (FileNotFoundError, NotADirectoryError):
            self._bad(entry.path, "missing")
            return False
        except StoreError as error:
            self._bad(entry.path, str(error))
            return False
        self.count(entry.path, size)
        if size != entry.bytes:
            self._bad(entry.path, f"{size} bytes, the manifest says {entry.bytes}")
        elif digest != entry.sha256:
            self._bad(entry.path, f"sha256 {digest}, the manifest says {entry.sha256}")
        else:
            return True
        return False

    def _count_rows(self, entry: FileEntry, found: int) -> bool:
        if found != entry.rows:
            self._bad(entry.path, f"{found} rows, the manifest says {entry.rows}")
        return found == entry.rows

    def _drop_copies(self) -> None:
        while self._copies:
            self._copies.popitem()[1].unlink()
