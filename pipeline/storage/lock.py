"""One run at a time in a run folder.

The owner writes a lease, `.lease.json`, and renews it every 15 s; a lease that was not renewed for 120 s belongs to a
dead run, and is taken over. On a local folder a file lock detects dead processes of this machine at once; the lease is
for other machines that share the folder. Clocks must agree within a minute; a lease from a clock that is further ahead
is watched, and taken over if nobody renews it. A lease that cannot be read is nobody's.

Every workflow asks the same `Lease`, at each step's end and before each change of the folder. A lease changes hands by
replacing the version that was read, so of several runs that meet an expired one a single one gets it, and a process
that was suspended while it renewed does not get it back. A run whose lease is gone stops too: another one may have had
the folder and ended.

Drivers of parts of a run hold a lease each, `parts/NUMBER.lease.json`, and go on together; a run of all of the folder
and they exclude each other: each takes its own lease, and then looks for those of the others.
"""

import getpass
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import ConfigError, LockedError, PipelineError
from pipeline.storage import LocalStorage, Storage
from pipeline.storage.disk import takes_no_data
from pipeline.storage.files import make_folder

log = logging.getLogger(__name__)

LEASE = ".lease.json"
_LOCK = ".lock"
PARTS = "parts"
"""Folder of what the drivers of parts write for themselves."""
RENEW_S = 15.0
EXPIRE_S = 120.0
_STEP_S = 1.0
"""At a step's end a local lease is read again after so long."""
_FAR_STEP_S = RENEW_S + 5.0
"""The same on an object store, where a thread reads it every `RENEW_S`: only a suspended process reads it itself."""
_ANSWER_S = 5.0
"""A step does not wait longer for an object store to answer."""
_TRIES = 5
_LOCK_TIMEOUT_S = 1.0  # `pipeline status` holds the lock for a moment
_POLL_S = 1.0
_PATIENCE_S = 5.0
"""A driver of a part waits so long for a run of all, which may be another driver that looks whether it is the last."""
_MOST_CLOCKS_DIFFER_S = 60.0
_NUMBERS = ("pid", "since", "renewed")
_TEXTS = ("owner", "host", "user")


class Lease:
    """The right to write into a run folder. Picklable: workers ask it before they write."""

    def __init__(self, storage: Storage, owner: str, name: str = LEASE):
        self.storage = storage
        self.owner = owner
        self.name = name
        self.lost = ""
        """Who has taken the folder over, in words, once that is known; the right never comes back."""
        self._seen_s = -math.inf
        self._asking: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"storage": self.storage, "owner": self.owner, "name": self.name, "lost": self.lost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["storage"], state["owner"], state["name"])
        self.lost = state["lost"]

    def check(self, within_s: float = 0.0) -> None:
        """Asks whether the folder is still this run's.

        Args:
            within_s: what was read within so many seconds suffices; time in which the process was suspended counts.

        Raises:
            LockedError: another run has taken the folder over.
            MachineError: the object store does not answer.
        """
        if not self.lost and _clock_s() - self._seen_s > within_s:
            self._read()
        if self.lost:
            raise LockedError(self.lost)

    def check_change(self) -> None:
        """The same before each change of the folder, in the process that renews the lease.

        Raises:
            LockedError: another run has taken the folder over.
            MachineError: the object store does not answer.
        """
        self.check(_STEP_S if isinstance(self.storage, LocalStorage) else _FAR_STEP_S)

    def check_step(self) -> None:
        """The same at a step's end: without waiting for a store that does not answer, which is not a loss.

        Raises:
            LockedError: another run has taken the folder over.
        """
        if isinstance(self.storage, LocalStorage):
            with suppress(OSError):  # a network file system that is away for a moment
                self.check(_STEP_S)
            return
        if not self.lost and _clock_s() - self._seen_s > _FAR_STEP_S and self._asking is None:
            asking = self._asking = threading.Thread(target=self._ask, daemon=True, name="lease-step")
            asking.start()
            asking.join(_ANSWER_S)
        if self.lost:
            raise LockedError(self.lost)

    def _ask(self) -> None:
        try:
            self._read()
        except (PipelineError, OSError) as error:
            log.warning("the lease could not be read: %s", error)
        finally:
            self._asking = None

    def _read(self) -> None:
        asked_s = _clock_s()
        found = read_lease(self.storage, self.name)
        if found is not None and found["owner"] == self.owner:
            self._seen_s = asked_s
            return
        gone = f"({self.name} is gone: another run had it, or it was deleted)"
        to = f"to {describe(found)}" if found is not None else gone
        self.lost = f"--out {self.storage.url}: this run lost the folder {to}; it stops, and its finished work stays"


class RunLock:
    """Context in which the run folder of a storage, or one of its parts, belongs to this process.

    Args:
        name: of the lease: `LEASE`, or one of `lease_of_part`.

    Attributes:
        lease: the right to write; valid inside the context.

    Raises, on entering:
        LockedError: another run holds the folder; names its process, and since when.
        ConfigError: the folder cannot be made.
    """

    def __init__(self, storage: Storage, *, take_over: bool = False, name: str = LEASE):
        self.storage = storage
        self.take_over = take_over
        self.name = name
        self.lease = Lease(storage, uuid.uuid4().hex, name)
        self._since = time.time()
        self._file_lock: FileLock | None = None
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, daemon=True, name="lease")

    def __enter__(self) -> Lease:
        if isinstance(self.storage, LocalStorage):
            self._lock_file(self.storage)
        try:
            self._acquire()
            try:
                self._exclude_others()
            except BaseException:
                self._release()
                raise
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
            self._release()
        finally:
            self._unlock_file()

    def _release(self) -> None:
        found = read_lease(self.storage, self.name)
        if found is not None and found["owner"] == self.lease.owner:
            self.storage.delete(self.name)

    def _exclude_others(self) -> None:
        """A run of all ends a part's, or is refused because of it, and the other way round."""
        is_part = self.name != LEASE
        end = time.monotonic() + (_PATIENCE_S if is_part else 0.0)
        for name in [LEASE] if is_part else leases_of_parts(self.storage):
            if self.take_over:
                self.storage.delete(name)
            while is_held(self.storage, name):
                if time.monotonic() >= end:
                    raise self._refusal(read_lease(self.storage, name), name)
                time.sleep(_POLL_S)

    def _lock_file(self, storage: LocalStorage) -> None:
        try:
            make_folder((storage.root / self.name).parent)
        except OSError as error:
            if takes_no_data(error):
                raise
            raise ConfigError(
                f"--out {storage.url}: cannot be made ({error.strerror}); choose a folder that you can write to"
            ) from error
        lock = FileLock(storage.root / _lock_of(self.name))
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_S)
        except Timeout as error:
            raise self._refusal(read_lease(storage, self.name)) from error
        self._file_lock = lock

    def _unlock_file(self) -> None:
        if self._file_lock is not None:
            self._file_lock.release()

    def _acquire(self) -> None:
        for _ in range(_TRIES):
            if self._created():
                return
            version = self.storage.version(self.name)
            if version is None:
                continue  # its owner ended meanwhile
            found = read_lease(self.storage, self.name)
            if found is None:
                time.sleep(_POLL_S)  # without hard links its name is there before its content
                version, found = self.storage.version(self.name), read_lease(self.storage, self.name)
            if found is not None and not (self.take_over or self._is_dead(found)):
                raise self._refusal(found)
            if version is None:
                continue
            if self.storage.replace(self.name, self._content(), version):
                return
            break
        now = read_lease(self.storage, self.name)
        if now is None or now["owner"] != self.lease.owner:  # else an answer was lost on the way
            raise self._refusal(now)

    def _created(self) -> bool:
        """Takes a lease that does not exist."""
        try:
            return self.storage.create(self.name, self._content())
        except FileNotFoundError:  # it existed, and ended meanwhile
            return False

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
            if read_lease(self.storage, self.name) != lease:
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
                version = self.storage.version(self.name)
                self.lease.check()
                if version is not None:  # else it was deleted just now
                    self.storage.replace(self.name, self._content(), version)
            except LockedError:
                return
            except (PipelineError, OSError, ValueError) as error:
                log.warning("the lease could not be renewed, trying again: %s", error)

    def _refusal(self, lease: dict[str, Any] | None, name: str = "") -> LockedError:
        part = part_of_lease(name or self.name)
        what = f"another run is working {'in this folder' if part is None else f'on part {part} of it'}"
        return LockedError(
            f"--out {self.storage.url}: {what}: {describe(lease)}. Wait for it, or "
            f"choose another folder. If it is dead, its lease expires {EXPIRE_S:.0f} s after its last renewal; "
            "--take-over does not wait for that"
        )


def _clock_s() -> float:
    """Seconds on a clock that goes on while the process, or the machine, is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def lease_of_part(part: int | str) -> str:
    """The name of the lease of a part, by its number, or of what several parts do one after the other."""
    return f"{PARTS}/{part:05d}{LEASE}" if isinstance(part, int) else f"{PARTS}/{part}{LEASE}"


def part_of_lease(name: str) -> int | None:
    """The number in a name of `lease_of_part`."""
    digits = name.removeprefix(f"{PARTS}/").removesuffix(LEASE)
    return int(digits) if name.startswith(f"{PARTS}/") and digits.isdigit() else None


def leases_of_parts(storage: Storage) -> list[str]:
    """The leases of parts that are there, also of dead drivers."""
    return sorted(f"{PARTS}/{name}" for name in storage.names(PARTS) if name.endswith(LEASE))


def running_parts(storage: Storage) -> list[int]:
    """The numbers of the parts whose drivers are at work."""
    found = ((part_of_lease(name), name) for name in leases_of_parts(storage))
    return sorted(part for part, name in found if part is not None and is_held(storage, name))


def _lock_of(name: str) -> str:
    return name.removesuffix(LEASE) + _LOCK


def read_lease(storage: Storage, name: str = LEASE) -> dict[str, Any] | None:
    """The lease of a folder, or of a part; None if there is none that can be read."""
    lease = storage.read_json_if_whole(name)
    if not isinstance(lease, dict):
        return None
    whole = all(isinstance(lease.get(name), str) for name in _TEXTS)
    return lease if whole and all(isinstance(lease.get(name), int | float) for name in _NUMBERS) else None


def is_running(storage: Storage) -> bool:
    """True while some process holds the folder or a part of it; see `is_held`."""
    return is_held(storage, LEASE) or any(is_held(storage, name) for name in leases_of_parts(storage))


def describe_holder(storage: Storage) -> str:
    """The process that holds the folder, in words; of several that hold parts of it, the first."""
    names = [name for name in (LEASE, *leases_of_parts(storage)) if read_lease(storage, name) is not None]
    first = describe(read_lease(storage, names[0] if names else LEASE))
    return first if len(names) < 2 else f"{first}, and {len(names) - 1} more"


def is_held(storage: Storage, name: str) -> bool:
    """True while some process has the lease; on a local folder that cannot be written to, as far as is known."""
    lease = read_lease(storage, name)
    if lease is None:
        return False
    recent = abs(time.time() - lease["renewed"]) <= EXPIRE_S
    if not isinstance(storage, LocalStorage) or lease["host"] != socket.gethostname():
        return recent
    lock = FileLock(storage.root / _lock_of(name))
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
