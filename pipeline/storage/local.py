"""A local folder: a file is written under a temporary name, made durable and renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.storage.base import Storage
from pipeline.storage.files import TEMPORARY_MARK, commit_file, remove_temporaries, temporary_name

_WRITTEN_BY_RUNS = ("store", "staging", "state", "quarantine", "input", "retries")


class LocalStorage(Storage):
    """A folder of this machine, or of a file system that all nodes share."""

    def __init__(self, root: Path):
        self.root = root.absolute()
        self.url = str(self.root)

    @property
    def local(self) -> Path:
        return self.root

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}"  # not a Path, which costs as much as the system call

    def read(self, name: str) -> bytes:
        with open(self._path(name), "rb", buffering=0) as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        with self.writing(name) as path:
            path.write_bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        temporary = self.new_file(name)
        temporary.write_bytes(data)
        try:
            os.link(temporary, self.root / name)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
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

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def delete_folder(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)

    def copy(self, name: str) -> Path:
        if not (self.root / name).is_file():
            raise FileNotFoundError(f"{self.root / name} does not exist")
        return self.root / name

    def release(self, copy: Path) -> None:
        pass

    def new_file(self, name: str) -> Path:
        final = self.root / name
        final.parent.mkdir(parents=True, exist_ok=True)
        return temporary_name(final)

    def publish(self, local: Path, name: str) -> None:
        commit_file(local, self.root / name)

    def new_folder(self) -> Path:
        staging = self.root / "staging"
        staging.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=TEMPORARY_MARK, dir=staging))

    def clean(self) -> int:
        return sum(remove_temporaries(self.root / part) for part in _WRITTEN_BY_RUNS)
