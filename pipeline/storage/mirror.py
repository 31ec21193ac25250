"""A local copy of a run folder on an object store, whose changes are sent back; for work that needs a local folder.

Files named in `LAST` mark the files next to them as complete: they are sent after them, and deleted before them. So a
reader of the object store, and a run that resumes from it, never takes a partly sent folder for a complete one.
"""

import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.storage import LocalStorage, Storage
from pipeline.storage.events import EVENTS_FOLDER
from pipeline.storage.files import TEMPORARY_MARK
from pipeline.storage.lock import LEASE
from pipeline.storage.run_folder import CONFIG, PLAN, SUMMARY

log = logging.getLogger(__name__)

LAST = ("state.json",)
_ENGINE_FILES = (LEASE, CONFIG, PLAN, SUMMARY)
SEND_EVERY_S = 30.0
_Version = tuple[int, int]
"""Size in bytes and modification time in ns."""


class Mirror:
    """A local copy of a folder on an object store, without the engine's own files."""

    def __init__(self, storage: Storage, folder: Path):
        self.storage = storage
        self.folder = folder
        self._sent: dict[str, _Version] = {}

    def fetch(self) -> None:
        """Makes the local copy."""
        for name in self.storage.walk():
            if name in _ENGINE_FILES or name.startswith(f"{EVENTS_FOLDER}/"):
                continue
            local = self.folder / name
            local.parent.mkdir(parents=True, exist_ok=True)
            copy = self.storage.copy(name)
            copy.replace(local)
            self._sent[name] = _version(local)

    def send(self) -> None:
        """Sends new and changed files, and deletes what was deleted locally."""
        found = self._walk()
        for name in sorted(self._sent.keys() - found.keys(), key=_goes_last, reverse=True):
            self.storage.delete(name)
            del self._sent[name]
        for name in sorted(found, key=_goes_last):
            if self._sent.get(name) != found[name]:
                try:
                    self.storage.write_file(name, self.folder / name)
                except FileNotFoundError:  # deleted meanwhile; the next round deletes it there
                    continue
                self._sent[name] = found[name]

    @contextmanager
    def kept_equal(self) -> Iterator[Path]:
        """The local folder, fetched; changes are sent every 30 s while the block runs, and at its end in any case."""
        self.fetch()
        ended = threading.Event()
        sender = threading.Thread(target=self._send_now_and_then, args=(ended,), daemon=True, name="mirror")
        sender.start()
        try:
            yield self.folder
        finally:
            ended.set()
            sender.join()
            self.send()

    def _send_now_and_then(self, ended: threading.Event) -> None:
        while not ended.wait(SEND_EVERY_S):
            try:
                self.send()
            except (PipelineError, OSError) as error:
                log.warning("not sent, trying again: %s", error)

    def _walk(self) -> dict[str, _Version]:
        found: dict[str, _Version] = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if name in _ENGINE_FILES or any(part.startswith(TEMPORARY_MARK) for part in path.parts):
                continue
            try:
                if path.is_file():
                    found[name] = _version(path)
            except FileNotFoundError:
                continue
        return found


@contextmanager
def working_folder(storage: Storage, *, sends: bool = True) -> Iterator[Path]:
    """The run's folder if it is local, else a local copy of it while the block runs.

    Args:
        sends: send changes back; False for all but one of several processes.
    """
    if isinstance(storage, LocalStorage):
        yield storage.root
        return
    folder = storage.new_folder()
    mirror = Mirror(storage, folder)
    try:
        if sends:
            with mirror.kept_equal():
                yield folder
        else:
            mirror.fetch()
            yield folder
    finally:
        shutil.rmtree(folder)


def _version(path: Path) -> _Version:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _goes_last(name: str) -> tuple[bool, str]:
    return name.rpartition("/")[2] in LAST, name
