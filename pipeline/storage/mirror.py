"""A local copy of a run folder on an object store, whose changes are sent back; for work that needs a local folder.

A file named in `MARKS` declares the files next to it complete, as `state.json` does for a checkpoint. Changes are sent
in this order, so that a kill between any two requests, a store that takes nothing, and a process that was suspended
and goes on after another run took the folder over lose no whole checkpoint and leave none that only looks whole:

1. Where a whole checkpoint is there: metrics and other files that grow, with all that precedes the next one. A
   training that goes on from the one before removes what is too much.
2. The files of a new checkpoint; their sizes are compared with what arrived; then its mark.
3. What was deleted of the other files, then what is new or changed.
4. Checkpoints that were removed here are deleted there, marks first, and only if another whole one is there.

The right to write is checked before each of these; a file is created only where there is none, and replaced only while
it is the version that was just looked at (`ObjectStorage.replace_file`).
"""

import hashlib
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import EXIT_ENVIRONMENT, LockedError, MachineError, PipelineError
from pipeline.storage.base import Storage
from pipeline.storage.events import EVENTS_FOLDER
from pipeline.storage.files import TEMPORARY_MARK
from pipeline.storage.local import LocalStorage
from pipeline.storage.lock import LEASE, Lease
from pipeline.storage.marks import Marks, is_index
from pipeline.storage.objects import ObjectStorage
from pipeline.storage.run_folder import CONFIG, PLAN, SUMMARY
from pipeline.units import human_seconds

log = logging.getLogger(__name__)

MARKS = ("state.json",)
_ENGINE_FILES = (LEASE, CONFIG, PLAN, SUMMARY)
SEND_EVERY_S = 30.0
STUCK_AFTER_S = 600.0
"""Work whose changes could not be sent for so long is asked to stop."""
_LEASE_WITHIN_S = 5.0
"""While files are sent, the lease is read again after so long."""
_TRIES = 3
_GROWING = ".jsonl"
_Version = tuple[int, int]
"""Size in bytes and modification time in ns."""


class WorkingFolder:
    """The folder that a job works in: the run's own, or a local copy of it."""

    def __init__(self, path: Path, lease: Lease | None):
        self.path = path
        self._lease = lease

    def check(self) -> None:
        """To be called at the end of each step, and before each write; see `Lease.check_step`.

        Raises:
            LockedError: another run has taken the run folder over; nothing may be written any more.
        """
        if self._lease is not None:
            self._lease.check_step()

    def why_stop(self) -> str:
        """Why the work should save and stop; empty if it need not."""
        return ""

    def send(self) -> None:
        """Sends changes now; where what follows must not be sent before them."""


class Mirror(WorkingFolder):
    """A local copy of a folder on an object store, without the engine's own files."""

    def __init__(self, storage: ObjectStorage, path: Path, lease: Lease | None = None):
        super().__init__(path, lease)
        self.storage = storage
        self._marks = Marks(storage, "" if lease is None else lease.owner)
        self._sent: dict[str, _Version] = {}
        self._sending = threading.Lock()
        self._good_s = time.monotonic()
        self._failure: Exception | None = None
        self.is_kept = False
        """Whether the copy stays when the work has ended, as it could not be sent."""

    def fetch(self, *, sends: bool = True, alone: bool = True) -> None:
        """Makes the local copy: fetches it, or takes what this machine has kept of the run before.

        Args:
            sends: this process sends changes back.
            alone: no other process has a copy.
        Raises:
            MachineError: this machine has kept something, which the other processes do not have.
        """
        found = {name: size for name, size in self.storage.sizes().items() if _is_work(name)}
        self._marks.read([name for name in found if _is_mark(name)])
        late = self._marks.late & found.keys()
        for name in sorted(late):
            log.warning("%s/%s: a run that had lost the folder sent it; not used", self.storage.url, name)
        kept = _unsent(self.storage.url, self._marks.before)
        if sends and not alone and kept.is_dir():
            raise MachineError(
                f"{kept} on {socket.gethostname()}: is what an earlier run could not send, and several processes need "
                f"it; copy its files to {self.storage.url}, the folder checkpoints first, and delete it"
            )
        if sends:
            self._marks.claim()
            self._delete_late(late)
        if sends and kept.is_dir():
            self._adopt(kept, {name: found[name] for name in found.keys() - late})
            return
        for name in sorted(found.keys() - late):
            local = self.path / name
            local.parent.mkdir(parents=True, exist_ok=True)
            self.storage.copy(name).replace(local)
            self._sent[name] = _version(local)

    def _adopt(self, kept: Path, there: dict[str, int]) -> None:
        """Works with what the run before could not send; no other run was there since."""
        log.warning("%s: going on with what could not be sent then, from %s", self.storage.url, kept)
        _check_own(kept.parent)
        self.path.rmdir()
        self.path = kept.rename(_unsent(self.storage.url, self._marks.owner))  # and there it stays if it is killed
        here = self._walk()
        whole = {_folder(name) for name in there.keys() & here.keys() if _is_mark(name)}
        for name, size in there.items():
            same = name in here and here[name][0] == size and _folder(name) in whole
            self._sent[name] = here[name] if same else (-1, -1)

    def send(self) -> None:
        """Sends changes back, in the order that the head of this file describes.

        Raises:
            LockedError: another run has taken the folder over; nothing more is sent.
            MachineError: the store does not take it.
        """
        with self._sending:
            self._check_lease(0.0)
            with tempfile.TemporaryDirectory(prefix=TEMPORARY_MARK, dir=self.path) as folder:
                if any(map(_is_mark, self._sent)):
                    found = self._walk()
                    copies, grown = self._copied(Path(folder))
                else:  # without a checkpoint they must not tell of one that is not sent
                    copies, grown = self._copied(Path(folder))
                    found = self._walk()
                self._send(found | grown, copies)
            self._good_s, self._failure = time.monotonic(), None

    def _send(self, found: dict[str, _Version], copies: dict[str, Path]) -> None:
        changed = sorted(name for name in found if self._sent.get(name) != found[name])
        gone = sorted(self._sent.keys() - found.keys())
        known = {_folder(name) for name in (*found, *self._sent) if _is_mark(name)}
        if any(map(_is_mark, self._sent)):
            for name in sorted(copies):
                self._put(name, found, copies[name])
        for folder in sorted({_folder(name) for name in changed} & known):
            if any(_is_mark(name) and _folder(name) == folder for name in found):
                self._send_folder(folder, found)
        for name in gone:
            if _folder(name) not in known:
                self._delete(name)
        for name in changed:
            if _folder(name) not in known and self._sent.get(name) != found[name]:
                self._put(name, found, copies.get(name))
        self._delete_folders({_folder(name) for name in gone} & known, found)

    def _send_folder(self, folder: str, found: dict[str, _Version]) -> None:
        """Sends a marked folder: its files, and when they have arrived its mark."""
        inside = sorted(name for name in found if _folder(name) == folder)
        files, marks = [n for n in inside if not _is_mark(n)], [n for n in inside if _is_mark(n)]
        for _ in range(_TRIES):
            for name in files:
                if self._sent.get(name) != found[name] and not self._put(name, found):
                    return  # deleted meanwhile
            there = self.storage.sizes(folder)
            wrong = [name for name in files if there.get(name) != found[name][0]]
            if not wrong:
                break
            for name in wrong:
                self._sent.pop(name, None)
        else:
            raise MachineError(
                f"{self.storage.url}/{wrong[0]}: {there.get(wrong[0], 0)} of {found[wrong[0]][0]} bytes arrived, also "
                f"after {_TRIES} tries; check the object store"
            )
        for name in marks:
            if self._sent.get(name) != found[name]:
                self._check_lease(_LEASE_WITHIN_S)
                self._marks.write_down(name)
                self._put(name, found)

    def _delete_folders(self, folders: set[str], found: dict[str, _Version]) -> None:
        """Deletes marked folders that were removed here, if a whole one stays next to them."""
        for above in sorted({_folder(folder) for folder in folders}):
            there = self.storage.sizes(above)
            self._delete_late(there.keys())
            sent = {_folder(name) for name in found if _is_mark(name) and self._sent.get(name) == found[name]}
            leaving = sorted(folder for folder in folders if _folder(folder) == above)
            if not any(
                all(there.get(name) == size for name, (size, _) in found.items() if _folder(name) == folder)
                for folder in sent
                if _folder(folder) == above
            ):
                log.warning("%s: %s stay, as nothing whole is there but them", self.storage.url, ", ".join(leaving))
                continue
            names = [name for name in self._sent.keys() - found.keys() if _folder(name) in leaving]
            for name in sorted(names, key=lambda name: (not _is_mark(name), name)):
                self._delete(name)

    def _put(self, name: str, found: dict[str, _Version], source: Path | None = None) -> bool:
        """Sends a file; False if it was deleted here meanwhile."""
        local = source or self.path / name
        version = self.storage.version(name) if name in self._sent else None
        for _ in range(_TRIES):
            self._check_lease(_LEASE_WITHIN_S)
            try:
                written = self.storage.replace_file(name, local, version)
            except FileNotFoundError:
                return False
            if written:
                self._sent[name] = found[name]
                return True
            self._check_lease(0.0)  # another run's, or this one's whose answer was lost, or a late one
            version = self.storage.version(name)
        raise MachineError(f"{self.storage.url}/{name}: something else writes it too; find out what, and stop it")

    def _delete(self, name: str) -> None:
        self._check_lease(_LEASE_WITHIN_S)
        self.storage.delete(name)
        del self._sent[name]
        if _is_mark(name):
            self._marks.forget(name)

    def _delete_late(self, there: Collection[str]) -> None:
        for name in sorted(self._marks.late & set(there)):
            self._check_lease(_LEASE_WITHIN_S)
            self.storage.delete(name)

    def _check_lease(self, within_s: float) -> None:
        if self._lease is not None:
            self._lease.check(within_s)

    def why_stop(self) -> str:
        failed_s = time.monotonic() - self._good_s
        if self._failure is None or failed_s < STUCK_AFTER_S:
            return ""
        return f"nothing could be sent to {self.storage.url} for {human_seconds(failed_s)}: {self._failure}"

    @contextmanager
    def kept_equal(self, *, alone: bool = True) -> Iterator["Mirror"]:
        """The local folder, fetched; changes are sent every 30 s while the block runs, and at its end in any case.

        What the end cannot send is kept on this machine, and the error says where.
        """
        self.fetch(alone=alone)
        ended = threading.Event()
        sender = threading.Thread(target=self._send_now_and_then, args=(ended,), daemon=True, name="mirror")
        sender.start()
        try:
            try:
                yield self
            finally:
                ended.set()
                sender.join()
        except LockedError:
            raise
        except BaseException:
            self._finish()
            raise
        self._finish()

    def _finish(self) -> None:
        """Sends the last changes and compares all that is there; keeps them here if that fails."""
        try:
            for _ in range(_TRIES):
                self.send()
                there, here = self.storage.sizes(), self._walk()
                self._delete_late(there.keys())
                wrong = [name for name, (size, _) in here.items() if there.get(name) != size]
                if not wrong:
                    return
                for name in wrong:
                    self._sent.pop(name, None)
            raise MachineError(f"{self.storage.url}: {wrong[0]} did not arrive as it was sent; check the object store")
        except LockedError:
            raise
        except (PipelineError, OSError) as error:
            kept = MachineError(
                f"{error}; what was not sent is kept in {self._keep()} on {socket.gethostname()}: the same command "
                f"there sends it and goes on from it; to go on elsewhere, copy its files to {self.storage.url} first"
            )
            kept.exit_code = getattr(error, "exit_code", EXIT_ENVIRONMENT)
            raise kept from error
        except BaseException:  # a second stop signal
            log.warning("%s: what was not sent is kept in %s", self.storage.url, self._keep())
            raise

    def _keep(self) -> Path:
        kept = _unsent(self.storage.url, self._marks.owner)
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        _check_own(kept.parent)
        if self.path != kept:
            shutil.move(self.path, kept)
        self.path, self.is_kept = kept, True
        return kept

    def _send_now_and_then(self, ended: threading.Event) -> None:
        while not ended.wait(SEND_EVERY_S):
            try:
                self.send()
            except LockedError:  # the step's end knows it too
                return
            except (PipelineError, OSError) as error:
                self._failure = error
                log.warning("not sent, trying again: %s", error)

    def _copied(self, folder: Path) -> tuple[dict[str, Path], dict[str, _Version]]:
        """Copies of the files that grow while they are sent, by name, and the versions they are of."""
        grown = {name: version for name, version in self._walk().items() if name.endswith(_GROWING)}
        changed = [name for name in grown if self._sent.get(name) != grown[name]]
        copies = {name: folder / str(number) for number, name in enumerate(changed)}
        for name, copy in copies.items():
            shutil.copyfile(self.path / name, copy)
        return copies, grown

    def _walk(self) -> dict[str, _Version]:
        found: dict[str, _Version] = {}
        for above, folders, names in os.walk(self.path):  # it passes over folders that are removed meanwhile
            folders[:] = [name for name in folders if not name.startswith(TEMPORARY_MARK)]
            for path in (Path(above, name) for name in names if not name.startswith(TEMPORARY_MARK)):
                name = path.relative_to(self.path).as_posix()
                if _is_work(name):
                    with suppress(FileNotFoundError):
                        found[name] = _version(path)
        return found


@contextmanager
def working_folder(
    storage: Storage, lease: Lease | None = None, *, sends: bool = True, alone: bool = True
) -> Iterator[WorkingFolder]:
    """The run's folder if it is local, else a local copy of it while the block runs.

    Args:
        lease: the right to write, of the run.
        sends: send changes back; False for all but one of several processes.
        alone: there is one process.
    """
    if isinstance(storage, LocalStorage):
        yield WorkingFolder(storage.root, lease)
        return
    assert isinstance(storage, ObjectStorage)
    mirror = Mirror(storage, storage.new_folder(), lease)
    try:
        if sends:
            with mirror.kept_equal(alone=alone):
                yield mirror
        else:
            mirror.fetch(sends=False)
            yield mirror
    finally:
        if not mirror.is_kept:
            shutil.rmtree(mirror.path, ignore_errors=True)


def _version(path: Path) -> _Version:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _is_work(name: str) -> bool:
    return name not in _ENGINE_FILES and not name.startswith(f"{EVENTS_FOLDER}/") and not is_index(name)


def _is_mark(name: str) -> bool:
    return name.rpartition("/")[2] in MARKS


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _unsent(url: str, owner: str) -> Path:
    """Where this machine keeps what a run could not send: of a folder, and of the owner of its lease."""
    name = hashlib.sha256(f"{url} {owner}".encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"imagen-precompute-unsent-{os.getuid()}" / name


def _check_own(path: Path) -> None:
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise MachineError(f"{path}: belongs to another user; set TMPDIR to a folder of your own")
