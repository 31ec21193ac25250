"""One run at a time in a run folder.

The owner writes a lease, `.lease.json`, and renews it every 15 s; a lease that was not renewed for 120 s belongs to a
dead run, and is taken over. On a local folder a file lock detects dead processes of this machine at once; the lease is
for other machines that share the folder. Clocks must agree within a minute; a lease from a clock that is further ahead
is watched, and taken over if nobody renews it. A lease that cannot be read is nobody's.
"""

import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import ConfigError, LockedError, PipelineError
from pipeline.storage import LocalStorage, Storage
from pipeline.storage.disk import takes_no_data
from pipeline.storage.files import make_folder

log = logging.getLogger(__name__)

LEASE = ".lease.json"
RENEW_S = 15.0
EXPIRE_S = 120.0
_LOCK_TIMEOUT_S = 1.0  # `pipeline status` holds the lock for a moment
_POLL_S = 1.0
_MOST_CLOCKS_DIFFER_S = 60.0
_NUMBERS = ("pid", "since", "renewed")
_TEXTS = ("owner", "host", "user")


class Lease:
    """The right to write into a run folder. Picklable: workers check it before they commit to an object store."""

    def __init__(self, storage: Storage, owner: str):
        self.storage = storage
        self.owner = owner
        self.lost = False
        """Set once the driver knows that another run has taken over."""

    def check(self) -> None:
        """Raises LockedError if another run has taken the folder over."""
        found = read_lease(self.storage)
        if found is None or found["owner"] != self.owner:
            raise LockedError(
                f"--out {self.storage.url}: this run lost the folder to {describe(found)}; it stops, and its finished "
                "work stays"
            )


class RunLock:
    """Context in which the run folder of a storage belongs to this process.

    Attributes:
        lease: the right to write; valid inside the context.

    Raises, on entering:
        LockedError: another run holds the folder; names its process, and since when.
        ConfigError: the folder cannot be made.
    """

    def __init__(self, storage: Storage, *, take_over: bool = False):
        self.storage = storage
        self.take_over = take_over
        self.lease = Lease(storage, uuid.uuid4().hex)
        self._since = time.time()
        self._file_lock: FileLock | None = None
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, daemon=True, name="lease")

    def __enter__(self) -> Lease:
        if isinstance(self.storage, LocalStorage):
            self._lock_file(self.storage)
        try:
            self._acquire()
        except BaseException:
            self._unlock_file()
            raise
        self._renewal.start()
        return self.lease

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._renewal.join()
        try:
            found = read_lease(self.storage)
            if found is not None and found["owner"] == self.lease.owner:
                self.storage.delete(LEASE)
        finally:
            self._unlock_file()

    def _lock_file(self, storage: LocalStorage) -> None:
        try:
            make_folder(storage.root)
        except OSError as error:
            if takes_no_data(error):
                raise
            raise ConfigError(
                f"--out {storage.url}: cannot be made ({error.strerror}); choose a folder that you can write to"
            ) from error
        lock = FileLock(storage.root / ".lock")
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_S)
        except Timeout as error:
            raise self._refusal(read_lease(storage)) from error
        self._file_lock = lock

    def _unlock_file(self) -> None:
        if self._file_lock is not None:
            self._file_lock.release()

    def _acquire(self) -> None:
        if self.storage.create(LEASE, self._content()):
            return
        found = read_lease(self.storage)
        if found is None and self.storage.size(LEASE) is not None:
            time.sleep(_POLL_S)  # without hard links its name is there before its content
            found = read_lease(self.storage)
        if found is not None and not (self.take_over or self._is_dead(found)):
            raise self._refusal(found)
        self.storage.delete(LEASE)
        if not self.storage.create(LEASE, self._content()):
            raise self._refusal(read_lease(self.storage))

    def _is_dead(self, lease: dict[str, Any]) -> bool:
        """With the file lock held here, a lease of this machine belongs to a process that has ended."""
        if self._file_lock is not None and lease["host"] == socket.gethostname():
            return True
        age_s = time.time() - lease["renewed"]
        if age_s < -_MOST_CLOCKS_DIFFER_S:
            return self._is_not_renewed(lease)
        return age_s > EXPIRE_S

    def _is_not_renewed(self, lease: dict[str, Any]) -> bool:
        """Whether a lease stays as it is for as long as one that is not renewed is honoured; clocks do not matter."""
        waiting = "--out %s: its lease is from a clock that is ahead; waiting %g s whether %s renews it"
        log.warning(waiting, self.storage.url, EXPIRE_S, describe(lease))
        end = time.monotonic() + EXPIRE_S
        while time.monotonic() < end:
            time.sleep(_POLL_S)
            if read_lease(self.storage) != lease:
                return False
        return True

    def _content(self) -> bytes:
        lease = {
            "owner": self.lease.owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "user": _user(),
            "since": round(self._since, 3),
            "renewed": round(time.time(), 3),
        }
        return json.dumps(lease, indent=1).encode()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                self.lease.check()
                self.storage.write(LEASE, self._content())
            except LockedError:
                self.lease.lost = True
                return
            except (PipelineError, OSError, ValueError) as error:
                log.warning("the lease could not be renewed, trying again: %s", error)

    def _refusal(self, lease: dict[str, Any] | None) -> LockedError:
        return LockedError(
            f"--out {self.storage.url}: another run is working in this folder: {describe(lease)}. Wait for it, or "
            f"choose another folder. If it is dead, its lease expires {EXPIRE_S:.0f} s after its last renewal; "
            "--take-over does not wait for that"
        )


def read_lease(storage: Storage) -> dict[str, Any] | None:
    """The lease of a folder; None if there is none that can be read."""
    lease = storage.read_json_if_whole(LEASE)
    if not isinstance(lease, dict):
        return None
    whole = all(isinstance(lease.get(name), str) for name in _TEXTS)
    return lease if whole and all(isinstance(lease.get(name), int | float) for name in _NUMBERS) else None


def is_running(storage: Storage) -> bool:
    """True while some process holds the folder; on a local folder that cannot be written to, as far as is known."""
    lease = read_lease(storage)
    if lease is None:
        return False
    recent = abs(time.time() - lease["renewed"]) <= EXPIRE_S
    if not isinstance(storage, LocalStorage) or lease["host"] != socket.gethostname():
        return recent
    lock = FileLock(storage.root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return recent
    lock.release()
    return False


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"user {os.getuid()}"


def describe(lease: dict[str, Any] | None) -> str:
    """The owner of a lease, in words."""
    if lease is None:
        return "an unknown process"
    now = time.time()
    ahead = "" if now >= lease["renewed"] else ", by a clock that is ahead of this one"
    return (
        f"process {lease['pid']} of {lease['user']} on {lease['host']}, started {_ago(now - lease['since'])}, "
        f"last renewal {_ago(now - lease['renewed'])}{ahead}"
    )


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s ago" if seconds >= 0 else f"in {-seconds:.0f} s"
