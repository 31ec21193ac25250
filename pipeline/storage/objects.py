"""An object store such as `s3://` or `gs://`: an object appears when its upload ends."""

import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ConfigError, MachineError, first_line
from pipeline.storage.base import Storage
from pipeline.storage.credentials import without_secrets
from pipeline.storage.scratch import clean_scratch, scratch

log = logging.getLogger(__name__)

R = TypeVar("R")


class ObjectStorage(Storage):
    """A prefix of an object store, through fsspec. Credentials come from the environment of each process.

    An upload replaces the object atomically when it ends, so a reader sees the previous or the new one; large files
    are uploaded in parts. Transient errors (5xx, timeouts, broken connections, slow-down) are retried with growing
    pauses.
    """

    parallel = 32

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._connect()

    def _connect(self) -> None:
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **_options(self.url.partition("://")[0]))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"--out {self.url}: cannot be used: {first_line(error)}") from error

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.url = state["url"]
        self._connect()

    @property
    def local(self) -> Path:
        return scratch()

    def read(self, name: str) -> bytes:
        return self._call("read", name, self._fs.cat_file)

    def write(self, name: str, data: bytes) -> None:
        self._call("written", name, lambda path: self._fs.pipe_file(path, data))

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._call("written", name, lambda path: self._fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            return self.read(name) == data  # the first try may have succeeded without its response arriving
        return True

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
        local.stat()
        return self._replaced(name, version, lambda path, **match: self._fs.put_file(str(local), path, **match))

    def _replaced(self, name: str, version: str | None, write: Callable[..., object]) -> bool:
        match: dict[str, str] = {"mode": "create"}
        if version is not None:
            match = {"IfMatch": version} if self._decides_by_version else {}
            if not match and self.version(name) != version:
                return False

        def attempt(path: str) -> None:
            try:
                write(path, **match)
            except OSError as error:
                if _is_other_version(error):  # which s3fs does not tell from an invalid argument
                    raise FileExistsError(str(error)) from error
                raise

        try:
            self._call("written" if version is None else "replaced", name, attempt)
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

    def delete_folder(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._call("deleted", name, lambda path: self._fs.rm(path, recursive=True))

    def copy(self, name: str) -> Path:
        local = self.new_file(name)
        try:
            self._call("read", name, lambda path: self._fs.get_file(path, str(local)))
        except BaseException:
            local.unlink(missing_ok=True)
            raise
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
        from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

        path = f"{self._root}/{name}" if name else self._root

        def warn(state: RetryCallState) -> None:
            if state.attempt_number == _QUIET_TRIES and state.outcome is not None:
                error = state.outcome.exception()
                what = without_secrets(first_line(error)) if error else ""
                log.warning("%s/%s: not %s: %s; trying again for %g s", self.url, name, done, what, _PATIENCE_S)

        retrying = Retrying(
            retry=retry_if_exception(_is_transient),
            stop=stop_after_delay(_PATIENCE_S),
            wait=wait_exponential_jitter(initial=0.1, max=_LONGEST_PAUSE_S),
            before_sleep=warn,
            reraise=True,
        )
        try:
            return retrying(function, path)
        except FileExistsError:
            raise
        except Exception as error:  # each file system has its own classes
            if isinstance(error, FileNotFoundError) and done != "written":
                raise
            what = f"{type(error).__name__}: {without_secrets(first_line(error))}"
            raise MachineError(
                f"{self.url}/{name}: cannot be {done}: {what}; check that the address is right, that it can be "
                "reached, and that the environment's credentials allow this"
            ) from error


_PATIENCE_S = 300.0  # most outages are shorter
_LONGEST_PAUSE_S = 20.0
_QUIET_TRIES = 5
_LASTING = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)


def _is_transient(error: BaseException) -> bool:
    lasting = isinstance(error, _LASTING) or "redential" in type(error).__name__
    return isinstance(error, Exception) and not lasting


def _version(info: dict[str, Any]) -> str:
    """The version of an object: what the store calls it, or else its size and time."""
    known = info.get("ETag") or info.get("etag") or info.get("generation")
    return str(known or [info.get(key) for key in ("size", "LastModified", "mtime", "created", "updated")])


def _is_other_version(error: BaseException) -> bool:
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("Error", {}).get("Code") in ("PreconditionFailed", "412")


def _options(protocol: str) -> dict[str, Any]:
    """Options of the file system, except those that the user's fsspec configuration sets."""
    from fsspec.config import conf

    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write here too
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard"}}
    return {key: value for key, value in options.items() if key not in conf.get(protocol, {})}
