"""A local folder: a file is written under a temporary name, made durable and renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.storage.base import Storage
from pipeline.storage.files import (
    TEMPORARY_MARK,
    commit_file,
    create_file,
    fsync_path,
    make_folder,
    remove_if_present,
    remove_temporaries,
    temporary_name,
    write_bytes,
)
from pipeline.storage.scratch import clean_scratch

_STORE = "store"


class LocalStorage(Storage):
    """A folder of this machine, or of a file system that all nodes share."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root.absolute()
        self.url = str(self.root)

    @property
    def local(self) -> Path:
        return self.root

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root, "owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"])
        self.owner = state["owner"]

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}"  # not a Path, which costs as much as the system call

    def read(self, name: str) -> bytes:
        with open(self._path(name), "rb", buffering=0) as file:
            return file.read()

    def read_part(self, name: str, start: int, length: int) -> bytes:
        with open(self._path(name), "rb") as file:
            file.seek(start)
            return file.read(length)

    def write(self, name: str, data: bytes) -> None:
        self.before_change()
        write_bytes(self.root / name, data)

    def create(self, name: str, data: bytes) -> bool:
        self.before_change()
        temporary = self.new_file(name)
        try:
            temporary.write_bytes(data)
            return create_file(temporary, self.root / name)
        finally:
            remove_if_present(temporary)

    def version(self, name: str) -> str | None:
        try:
            status = os.stat(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"

    def replace(self, name: str, data: bytes, version: str) -> bool:
        if self.version(name) != version:
            return False
        self.write(name, data)
        return True

    def size(self, name: str) -> int | None:
        try:
            return os.stat(self._path(name)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str) -> Iterator[str]:
        if (self.root / folder).is_dir():
            with os.scandir(self.root / folder) as entries:
                yield from (e.name for e in entries if not e.name.startswith(TEMPORARY_MARK) and not e.is_dir())

    def entries(self) -> Iterator[tuple[str, bool]]:
        if self.root.is_dir():
            with os.scandir(self.root) as entries:
                yield from ((entry.name, entry.is_dir()) for entry in entries)

    def walk(self) -> Iterator[str]:
        for folder, folders, names in os.walk(self.root):
            folders.sort()
            for name in sorted(names):
                yield (Path(folder) / name).relative_to(self.root).as_posix()

    def write_file(self, name: str, local: Path) -> None:
        with self.writing(name) as path:
            shutil.copyfile(local, path)

    def delete(self, name: str, *, durably: bool = False) -> None:
        self.before_change()
        with suppress(FileNotFoundError):
            os.unlink(self._path(name))
            if durably:
                fsync_path((self.root / name).parent)

    def delete_folder(self, name: str) -> None:
        self.before_change()
        folder = self.root / name
        if not folder.is_symlink():
            shutil.rmtree(folder, onerror=_unless_gone)
            return
        for entry in folder.iterdir():  # a group on another disk: the link stays
            shutil.rmtree(entry, onerror=_unless_gone) if entry.is_dir() else entry.unlink(missing_ok=True)

    def copy(self, name: str) -> Path:
        if not (self.root / name).is_file():
            raise FileNotFoundError(f"{self.root / name} does not exist")
        return self.root / name

    def release(self, copy: Path) -> None:
        pass

    def new_file(self, name: str) -> Path:
        final = self.root / name
        make_folder(final.parent)
        return temporary_name(final, self.owner)

    def publish(self, local: Path, name: str) -> None:
        self.before_change()
        commit_file(local, self.root / name)

    def new_folder(self) -> Path:
        staging = self.root / "staging"
        make_folder(staging)
        return Path(tempfile.mkdtemp(prefix=TEMPORARY_MARK + self.owner, dir=staging))

    def clean(self, folder: str = "") -> int:
        return remove_temporaries(self.root / folder, linked=_STORE, owner=self.owner) + clean_scratch()


def _unless_gone(function: object, path: str, error: tuple[type[BaseException], BaseException, object]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]
