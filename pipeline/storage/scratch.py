"""Temporary files on this machine that are gone once their process is, however it ended.

Several machines may have the same TMPDIR, so a folder is named by the machine of its process too. A folder is deleted
only where that process is known to have ended.
"""

import fcntl
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.fingerprint import text_digest
from pipeline.storage.disk import is_own_file_system
from pipeline.storage.files import remove_if_present

_LOCK = "lock"
_NAME = re.compile(r"(?:(?P<machine>[\w.-]+-[0-9a-f]{12})-)?(?P<pid>\d+)(?:-\w+)?")  # earlier versions: no machine
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_DAY_S = 86400.0


class _Scratch:
    """The folder of one process. Its lock, which the system takes back when the process ends, says that it is used."""

    def __init__(self) -> None:
        above = _above()
        above.mkdir(parents=True, exist_ok=True, mode=0o700)
        clean_scratch()
        self.pid = os.getpid()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{machine()}-{self.pid}-", dir=above))
        _lock(self.folder)  # never closed: the system does that at the end of the process
        weakref.finalize(self, _remove, self.folder, self.pid)


_scratch: _Scratch | None = None
_making = threading.Lock()


def scratch() -> Path:
    """This process's folder for temporary files, below TMPDIR; removed when it ends.

    The first call removes what ended processes of this user on this machine have left there.
    """
    global _scratch
    with _making:  # a second one would remove the first one's files
        if _scratch is None or _scratch.pid != os.getpid() or not _scratch.folder.is_dir():
            _scratch = _Scratch()
        return _scratch.folder


@contextmanager
def temporary_folder(prefix: str = "") -> Iterator[Path]:
    """An empty folder while the block runs."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=scratch()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_file(owner: object, prefix: str = "") -> Path:
    """An empty file that is deleted with its owner."""
    number, name = tempfile.mkstemp(prefix=prefix, dir=scratch())
    os.close(number)
    weakref.finalize(owner, remove_if_present, Path(name))
    return Path(name)


def machine() -> str:
    """Name of this machine as processes see it that know each other's ids: host, and a digest of the boot of its
    kernel and the namespace of process ids. Containers of one machine have different ones."""
    host = socket.gethostname()
    return f"{host}-{text_digest(f'{host} {_boot()} {_process_namespace()}')[:12]}"


def clean_scratch() -> int:
    """Deletes the folders of processes that are known to have ended; returns their number."""
    above, count = _above(), 0
    with suppress(FileNotFoundError):
        folders = list(above.iterdir())
        own_disk = bool(folders) and is_own_file_system(above)
        for folder in folders:
            if _is_abandoned(folder, own_disk):
                shutil.rmtree(folder, ignore_errors=True)
                count += 1
    return count


def _is_abandoned(folder: Path, own_disk: bool) -> bool:
    """Whether the process of a folder is known to have ended.

    Args:
        own_disk: only this machine has the disk, so that whatever is on it belongs to a process of its kernel, and its
            locks are known here. On others only processes with the same name of the machine are.
    """
    if not folder.is_dir() or (_scratch is not None and folder == _scratch.folder and _scratch.pid == os.getpid()):
        return False
    name = _NAME.fullmatch(folder.name)
    if name is None or not (own_disk or name["machine"] == machine()):
        return False
    if not (folder / _LOCK).exists():  # killed before it had a lock, or about to take one
        known = name["machine"] == machine() or (name["machine"] is None and _age_s(folder) > _DAY_S)
        return known and not _is_alive(int(name["pid"]))
    try:
        os.close(_lock(folder))
    except OSError:  # it is held
        return False
    return True


def _age_s(folder: Path) -> float:
    """Seconds since a file was made or deleted in a folder; 0 if it is gone."""
    try:
        return time.time() - folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _lock(folder: Path) -> int:
    """An open file with the lock of a folder.

    Raises:
        OSError: another process holds it.
    """
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:  # not Linux
        return ""


def _process_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""


def _above() -> Path:
    return Path(tempfile.gettempdir()) / f"imagen-precompute-{os.getuid()}"


def _remove(folder: Path, pid: int) -> None:
    if pid == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
