"""events.jsonl: what happened in a run folder, one JSON line per event, over all its runs.

An object cannot be appended to: on an object store the lines are collected, and written every 10 s as a separate file
below events/.
"""

import io
import json
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pipeline.errors import LockedError
from pipeline.storage import LocalStorage, Storage
from pipeline.storage.files import make_folder
from pipeline.storage.lock import PARTS, Lease
from pipeline.storage.open import open_storage

_FILE = "events.jsonl"
EVENTS_FOLDER = "events"
_GATHER_S = 10.0


class EventLog:
    """Appends events. A killed driver loses none on a local folder, and the last 10 s of them on an object store."""

    def __init__(self, storage: Storage, lease: Lease | None = None):
        self._storage = storage
        self._lease = lease
        self._lines: list[str] = []
        self._file: io.FileIO | None = None
        self._mutex = threading.Lock()
        if isinstance(storage, LocalStorage):
            make_folder(storage.root)
            self._file = (storage.root / _FILE).open("ab+", buffering=0)
            end = self._file.seek(0, os.SEEK_END)
            if end and os.pread(self._file.fileno(), 1, end - 1) != b"\n":
                _append(self._file, b"\n")  # ends the line that a killed run left unfinished
        self._next_write = time.monotonic() + _GATHER_S

    def write(self, event: str, **fields: object) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False) + "\n"
        with self._mutex:
            if self._is_lost():
                return
            if self._file is not None:
                _append(self._file, line.encode("utf-8", "backslashreplace"))
                return
            self._lines.append(line)
            if time.monotonic() >= self._next_write:
                self._write_gathered()

    def close(self) -> None:
        with self._mutex:
            if self._file is not None:
                self._file.close()
            else:
                self._write_gathered()

    def _write_gathered(self) -> None:
        if self._lines and not self._is_lost():
            stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
            name = f"{EVENTS_FOLDER}/{stamp}-{time.time_ns() % 10**9:09d}-{uuid.uuid4().hex[:6]}.jsonl"
            with suppress(LockedError):
                self._storage.write_text(name, "".join(self._lines))
        self._lines.clear()
        self._next_write = time.monotonic() + _GATHER_S

    def _is_lost(self) -> bool:
        """Whether another run is known to have taken the folder over: then only its events belong here."""
        return self._lease is not None and bool(self._lease.lost)


def _append(file: io.FileIO, data: bytes) -> None:
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        file.truncate(end)  # no partial line on a full disk
        raise


class EventReader:
    """Reads the events of a folder as they are added: each call of `new` goes on where the one before ended."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._offset = 0
        self._file: tuple[int, int] | None = None
        """Device and inode of the local file."""
        self._read: dict[str, int] = {}
        """Bytes of the files read from an object store, by name."""
        self._pending: deque[bytes] = deque()
        """Lines of those files that no call has given yet."""

    def new(self) -> Iterator[dict[str, Any]]:
        """The events since the last one that was taken; an empty dict for a damaged line. A line without its end comes
        with a later call, when it is complete. A caller may stop anywhere: the next call gives the rest.

        Raises:
            ReplacedError: the events that were read are gone, so the folder is another one; read with a new reader.
        """
        return self._new_local(self._storage) if isinstance(self._storage, LocalStorage) else self._new_far()

    def _new_local(self, storage: LocalStorage) -> Iterator[dict[str, Any]]:
        try:
            file = (storage.root / _FILE).open("rb")
        except (FileNotFoundError, NotADirectoryError):
            if self._file is not None:
                raise ReplacedError(f"{storage.url}/{_FILE}: is gone") from None
            return
        with file:
            status = os.fstat(file.fileno())
            opened = status.st_dev, status.st_ino
            if self._file not in (None, opened) or status.st_size < self._offset:
                raise ReplacedError(f"{storage.url}/{_FILE}: was replaced")
            self._file = opened
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield _event(line)

    def _new_far(self) -> Iterator[dict[str, Any]]:
        sizes = {f"{EVENTS_FOLDER}/{name}": size for name, size, _ in self._storage.listing(EVENTS_FOLDER)}
        if (size := self._storage.size(_FILE)) is not None:  # of a folder that was copied here
            sizes[_FILE] = size
        if any(sizes.get(name) != size for name, size in self._read.items()):
            raise ReplacedError(f"{self._storage.url}/{EVENTS_FOLDER}: was replaced")
        names = sorted((name for name in sizes if name not in self._read), key=lambda name: (name != _FILE, name))
        for name, data in zip(names, self._storage.map(self._storage.read, names), strict=True):
            self._read[name] = sizes[name]
            self._pending += data.splitlines()
        while self._pending:
            yield _event(self._pending.popleft())


class ReplacedError(Exception):
    """The events that an `EventReader` has read are no longer those of the folder."""


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        event = None
    return event if isinstance(event, dict) else {}


def read_events(storage: Storage) -> Iterator[dict[str, Any]]:
    """The events of all runs of the folder, and then those of each part; an empty dict for a line that a killed run
    left unfinished."""
    for each in (storage, *event_folders_of_parts(storage).values()):
        for name in [_FILE, *(f"{EVENTS_FOLDER}/{file}" for file in sorted(each.names(EVENTS_FOLDER)))]:
            if each.size(name) is None:
                continue
            for line in each.read_lines(name):
                yield _event(line.encode("utf-8", "surrogatepass"))


def event_folders_of_parts(storage: Storage) -> dict[str, Storage]:
    """Where the drivers of parts of a run write their events, by name."""
    names = sorted(name for name, is_folder in open_storage(f"{storage.url}/{PARTS}").entries() if is_folder)
    return {name: open_storage(f"{storage.url}/{PARTS}/{name}") for name in names}
