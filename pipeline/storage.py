"""Where a run's files lie: a local folder, or an object store such as `s3://` or `gs://`.

A file is whole or absent, on both: locally it is written under a temporary name, made durable and renamed; an object
appears when its upload ends. Stages see local paths only: they read copies, and write files that are published when
they are finished.
"""

import json
import logging
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pipeline.credentials import check_no_credentials, without_secrets
from pipeline.errors import ConfigError, MachineError
from pipeline.files import TEMPORARY_MARK, commit_file, remove_temporaries, temporary_name

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class Storage(ABC):
    """Files by names such as `state/samples/00000.json`. Picklable: workers get a copy.

    Raises, on every call:
        FileNotFoundError: there is no file of this name.
        MachineError: the object store cannot be reached, or refuses, also after retries.
    """

    url: str
    """Path or URL, for people."""
    parallel: int = 1
    """Requests worth having under way at once."""

    @property
    @abstractmethod
    def local(self) -> Path:
        """The folder of this machine that files are written to, at least on their way."""

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Creates or replaces a small file."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Creates a small file; False if there is one, which then stays as it is."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none."""

    @abstractmethod
    def names(self, folder: str) -> Iterator[str]:
        """Names of the files right in a folder, without the folder, in no order."""

    @abstractmethod
    def walk(self) -> Iterator[str]:
        """Names of all files, sorted within a folder."""

    @abstractmethod
    def write_file(self, name: str, local: Path) -> None:
        """Creates or replaces a file with the content of a local one, which stays.

        Raises:
            FileNotFoundError: there is no such local file.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Removes a file if it is there."""

    @abstractmethod
    def delete_folder(self, name: str) -> None:
        """Removes a folder with all in it, if it is there."""

    @abstractmethod
    def copy(self, name: str) -> Path:
        """A local path to read the file from; give it back with `release`."""

    @abstractmethod
    def release(self, copy: Path) -> None:
        """Frees what `copy` took."""

    @abstractmethod
    def new_file(self, name: str) -> Path:
        """A local path, private to the caller, to write the file to before it is published."""

    @abstractmethod
    def publish(self, local: Path, name: str) -> None:
        """Makes a finished file from `new_file` visible under its name, durably and at once."""

    @abstractmethod
    def new_folder(self) -> Path:
        """An empty local folder for temporary files; the caller removes it."""

    @abstractmethod
    def clean(self) -> int:
        """Removes what killed processes left half-written; returns how many files."""

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write a file to; published at the end of the block, unless that raises."""
        local = self.new_file(name)
        try:
            yield local
            self.publish(local, name)
        finally:
            local.unlink(missing_ok=True)

    def read_lines(self, name: str) -> Iterator[str]:
        """The lines of a text file, streamed."""
        copy = self.copy(name)
        try:
            with copy.open(encoding="utf-8") as lines:
                yield from lines
        finally:
            self.release(copy)

    def read_json(self, name: str) -> Any:
        """The value in a JSON file, None if there is none."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None

    def write_json(self, name: str, value: object) -> None:
        self.write_text(name, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        self.write(name, text.encode("utf-8", "backslashreplace"))

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`function` of each item, in order; on an object store many are under way at once, a bounded number."""
        if self.parallel == 1:
            yield from map(function, items)
            return
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="storage") as threads:
            ahead: deque[Future[R]] = deque()
            try:
                for item in items:
                    ahead.append(threads.submit(function, item))
                    if len(ahead) > 2 * self.parallel:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()


def open_storage(place: str | os.PathLike[str]) -> Storage:
    """The storage behind a path or URL.

    Raises:
        ConfigError: the URL holds a user or password, or its protocol is unknown or needs a package.
    """
    text = os.fspath(place)
    if "://" not in text:
        return LocalStorage(Path(text))
    check_no_credentials(text, "--out")
    protocol, _, rest = text.partition("://")
    if protocol in ("file", "local"):
        return LocalStorage(Path(rest))
    return ObjectStorage(text)


class Chores:
    """Small work that nobody waits for, such as deletions: at once on a local folder, aside on an object store.

    An error ends the next `do` or `finish`.
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
        """Waits for all of it."""
        while self._pending:
            self._pending.popleft().result()


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
            raise FileNotFoundError(f"{self.root / name} is not there")
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


class ObjectStorage(Storage):
    """A prefix of an object store, through fsspec. Credentials come from the environment of each process.

    An upload replaces the object at once when it ends, so a reader sees the former one or the new one; large files go
    up in parts. What may pass (5xx, timeouts, broken connections, slow-down) is tried again with growing pauses.
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
            raise ConfigError(f"--out {self.url}: cannot be used: {_first_line(error)}") from error

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.url = state["url"]
        self._connect()

    @property
    def local(self) -> Path:
        return _scratch()

    def read(self, name: str) -> bytes:
        return self._call("read", name, self._fs.cat_file)

    def write(self, name: str, data: bytes) -> None:
        self._call("written", name, lambda path: self._fs.pipe_file(path, data))

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._call("written", name, lambda path: self._fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            return self.read(name) == data  # a first try may have got through though its answer did not
        return True

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

    def walk(self) -> Iterator[str]:
        found: list[str] = self._call("listed", "", self._fs.find)
        yield from (path[len(self._root) + 1 :] for path in sorted(found))

    def write_file(self, name: str, local: Path) -> None:
        local.stat()
        self._call("written", name, lambda path: self._fs.put_file(str(local), path))

    def delete(self, name: str) -> None:
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
        return _scratch() / f"{uuid.uuid4().hex[:12]}-{Path(name).name}"

    def publish(self, local: Path, name: str) -> None:
        self.write_file(name, local)
        local.unlink()

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=_scratch()))

    def clean(self) -> int:
        """Objects are never half-written; removes local files of processes of this machine that are gone."""
        count = 0
        for folder in _scratch().parent.iterdir():
            if folder.name.isdigit() and not Path(f"/proc/{folder.name}").exists():
                count += sum(1 for path in folder.rglob("*") if path.is_file())
                shutil.rmtree(folder, ignore_errors=True)
        return count

    def _call(self, done: str, name: str, function: Callable[[str], R]) -> R:
        from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

        path = f"{self._root}/{name}" if name else self._root

        def tell(state: RetryCallState) -> None:
            if state.attempt_number == _QUIET_TRIES and state.outcome is not None:
                error = state.outcome.exception()
                what = without_secrets(_first_line(error)) if error else ""
                log.warning("%s/%s: not %s: %s; tried again for %g s", self.url, name, done, what, _PATIENCE_S)

        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_delay(_PATIENCE_S),
            wait=wait_exponential_jitter(initial=0.1, max=_LONGEST_PAUSE_S),
            before_sleep=tell,
            reraise=True,
        )
        try:
            return retrying(function, path)
        except FileExistsError:
            raise
        except Exception as error:  # each file system has its own classes
            if isinstance(error, FileNotFoundError) and done != "written":
                raise
            what = f"{type(error).__name__}: {without_secrets(_first_line(error))}"
            raise MachineError(
                f"{self.url}/{name}: cannot be {done}: {what}; check that the address is right, that it can be "
                "reached, and that the environment's credentials allow this"
            ) from error


_PATIENCE_S = 300.0  # an outage of a night is often shorter
_LONGEST_PAUSE_S = 20.0
_QUIET_TRIES = 5
_HOPELESS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)


def _may_pass(error: BaseException) -> bool:
    lasting = isinstance(error, _HOPELESS) or "redential" in type(error).__name__
    return isinstance(error, Exception) and not lasting


def _options(protocol: str) -> dict[str, Any]:
    """Options of the file system that the user's fsspec configuration does not set."""
    from fsspec.config import conf

    options: dict[str, Any] = {"use_listings_cache": False}  # others write here too
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard"}}
    return {key: value for key, value in options.items() if key not in conf.get(protocol, {})}


def _scratch() -> Path:
    """This process's folder for files on their way; TMPDIR says where."""
    folder = Path(tempfile.gettempdir()) / f"imagen-precompute-{os.getuid()}" / str(os.getpid())
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
