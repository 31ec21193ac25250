"""An object store such as `s3://` or `gs://`: an object appears when its upload ends."""

import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from imagen_core.far import StorageError, call, create, download, open_filesystem, read_file
from pipeline.errors import ConfigError, first_line, storage_error
from pipeline.storage.base import Storage
from pipeline.storage.scratch import clean_scratch, scratch

R = TypeVar("R")


class ObjectStorage(Storage):
    """A prefix of an object store, through fsspec. Credentials come from the environment of each process.

    An upload replaces the object atomically when it ends, so a reader sees the previous or the new one; large files
    are uploaded in parts. Transient errors (5xx, timeouts, broken connections, slow-down) are retried with growing
    pauses.
    """

    parallel = 32

    def __init__(self, url: str):
        super().__init__()
        self.url = url.rstrip("/")
        self._connect()

    def _connect(self) -> None:
        try:
            self._fs, self._root = open_filesystem(self.url, use_listings_cache=False)  # others write here too
        except (ImportError, ValueError) as error:
            raise ConfigError(f"--out {self.url}: cannot be used: {first_line(error)}") from error

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["url"])

    @property
    def local(self) -> Path:
        return scratch()

    def read(self, name: str) -> bytes:
        path, url = self._place(name)
        with _told():
            return read_file(self._fs, path, url)

    def read_part(self, name: str, start: int, length: int) -> bytes:
        def read(path: str) -> bytes:
            end = min(start + length, int(self._fs.info(path)["size"]))  # S3 refuses a range behind the end
            return self._fs.cat_file(path, start=start, end=end) if start < end else b""

        return self._call("read", name, read)

    def write(self, name: str, data: bytes) -> None:
        self._call("written", name, lambda path: self._fs.pipe_file(path, data))

    def create(self, name: str, data: bytes) -> bool:
        path, url = self._place(name)
        self.before_change()
        with _told():
            return create(self._fs, path, url, data)

    def version(self, name: str) -> str | None:
        try:
            return _version(self._call("read", name, self._fs.info))
        except FileNotFoundError:
            return None

    def replace(self, name: str, data: bytes, version: str) -> bool:
        return self._replaced(name, version, lambda path, **match: self._fs.pipe_file(path, data, **match))

    def replace_file(self, name: str, local: Path, version: str | None) -> bool:
        """Creates a file (`version` None), or replaces the one of this version, with the content of a local file.

        Returns:
            False if there is another one, which stays unchanged.
        Raises:
            FileNotFoundError: there is no such local file.
        """
        filesystem, size_bytes = self._fs, local.stat().st_size
        if version is not None and self._decides_by_version and size_bytes >= _IN_PARTS_BYTES:
            if self.version(name) != version:
                return False
            filesystem = self._on_condition(version)
        return self._replaced(name, version, lambda path, **match: filesystem.put_file(str(local), path, **match))

    def _on_condition(self, version: str) -> Any:
        """The file system whose uploads in parts end only if what they replace is of a version.

        s3fs passes a condition of `put_file` on where it sends a file at once, and drops it where it sends parts; what
        is said of all requests it passes on to those that know it.
        """
        condition = {**self._fs.s3_additional_kwargs, "IfMatch": version}
        with _told():
            return open_filesystem(
                self.url, use_listings_cache=False, skip_instance_cache=True, s3_additional_kwargs=condition
            )[0]

    def _replaced(self, name: str, version: str | None, write: Callable[..., object]) -> bool:
        match: dict[str, str] = {"mode": "create"}
        if version is not None:
            match = {"IfMatch": version} if self._decides_by_version else {}
            if not match and self.version(name) != version:
                return False

        try:
            self._call("written" if version is None else "replaced", name, lambda path: write(path, **match))
        except (FileExistsError, FileNotFoundError):
            return False
        return True

    @property
    def _decides_by_version(self) -> bool:
        protocol = self._fs.protocol
        return "s3" in ((protocol,) if isinstance(protocol, str) else protocol)

    def size(self, name: str) -> int | None:
        try:
            return int(self._call("read", name, self._fs.info)["size"])
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> Iterator[str]:
        try:
            entries = self._call("listed", folder, lambda path: self._fs.ls(path, detail=True, refresh=True))
        except FileNotFoundError:
            return
        yield from (e["name"].rpartition("/")[2] for e in entries if e["type"] == "file")

    def listing(self, folder: str) -> Iterator[tuple[str, int, str]]:
        try:
            entries = self._call("listed", folder, lambda path: self._fs.ls(path, detail=True, refresh=True))
        except FileNotFoundError:
            return
        for entry in entries:
            if entry["type"] == "file":
                yield entry["name"].rpartition("/")[2], int(entry["size"]), _version(entry)

    def entries(self) -> Iterator[tuple[str, bool]]:
        try:
            entries = self._call("listed", "", lambda path: self._fs.ls(path, detail=True, refresh=True))
        except FileNotFoundError:
            return
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if entry["name"].rstrip("/") != self._root:
                yield name, entry["type"] == "directory"

    def walk(self) -> Iterator[str]:
        found: list[str] = self._call("listed", "", self._fs.find)
        yield from (path[len(self._root) + 1 :] for path in sorted(found))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Size in bytes of every file below a folder, by name."""
        found: dict[str, dict[str, Any]] = self._call("listed", folder, lambda path: self._fs.find(path, detail=True))
        return {path[len(self._root) + 1 :]: int(info["size"]) for path, info in found.items()}

    def write_file(self, name: str, local: Path) -> None:
        local.stat()
        self._call("written", name, lambda path: self._fs.put_file(str(local), path))

    def delete(self, name: str, *, durably: bool = False) -> None:
        with suppress(FileNotFoundError):
            self._call("deleted", name, self._fs.rm_file)

    def delete_all(self, names: Sequence[str]) -> None:
        paths = [f"{self._root}/{name}" for name in names]
        if len(names) == 1 or any(mark in self._root for mark in "*?["):  # `rm` would take it for a pattern
            super().delete_all(names)
        elif paths:
            try:
                self._call("deleted", "", lambda _: self._fs.rm(paths))
            except FileNotFoundError:  # some file systems stop at the first that is gone
                super().delete_all(names)

    def delete_folder(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._call("deleted", name, lambda path: self._fs.rm(path, recursive=True))

    def copy(self, name: str) -> Path:
        local, (path, url) = self.new_file(name), self._place(name)
        with _told():
            download(self._fs, path, url, local)
        return local

    def release(self, copy: Path) -> None:
        copy.unlink(missing_ok=True)

    def new_file(self, name: str) -> Path:
        return scratch() / f"{uuid.uuid4().hex[:12]}-{Path(name).name}"

    def publish(self, local: Path, name: str) -> None:
        self.write_file(name, local)
        local.unlink()

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=scratch()))

    def clean(self, folder: str = "") -> int:
        """Objects are never partly written; deletes local folders of ended processes of this machine."""
        return clean_scratch()

    def _call(self, done: str, name: str, function: Callable[[str], R]) -> R:
        path, url = self._place(name)
        with _told():
            return call(url, done, lambda: function(path), self.before_change if done in _CHANGES else lambda: None)

    def _place(self, name: str) -> tuple[str, str]:
        """Path on the file system and URL of a file, or of the whole folder."""
        return (f"{self._root}/{name}", f"{self.url}/{name}") if name else (self._root, self.url)


_IN_PARTS_BYTES = 50 * 2**20
"""s3fs sends files from twice this size on in parts."""
_CHANGES = ("written", "replaced", "deleted")
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "created")
"""What file systems call that which changes whenever an object is written; the first that there is counts."""


def _version(info: dict[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


@contextmanager
def _told() -> Iterator[None]:
    """Turns what storage refuses into the engine's errors."""
    try:
        yield
    except StorageError as error:
        raise storage_error(error) from error
