"""Temporary files on this machine that are gone once their process is, however it ended."""

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.storage.files import remove_if_present

_LOCK = "lock"


class _Scratch:
    """The folder of one process. Its lock, which the system takes back when the process ends, says that it is used."""

    def __init__(self) -> None:
        above = _above()
        above.mkdir(parents=True, exist_ok=True, mode=0o700)
        clean_scratch()
        self.pid = os.getpid()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.pid}-", dir=above))
        _lock(self.folder)  # never closed: the system does that at the end of the process
        weakref.finalize(self, _remove, self.folder, self.pid)


_scratch: _Scratch | None = None


def scratch() -> Path:
    """This process's folder for temporary files, below TMPDIR; removed when it ends.

    The first call removes what ended processes of this user have left there.
    """
    global _scratch
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


def clean_scratch() -> int:
    """Deletes the folders of processes of this machine that have ended; returns their number."""
    count = 0
    with suppress(FileNotFoundError):
        for folder in list(_above().iterdir()):
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                count += 1
    return count


def _is_abandoned(folder: Path) -> bool:
    if not folder.is_dir() or (_scratch is not None and folder == _scratch.folder and _scratch.pid == os.getpid()):
        return False
    pid = folder.name.partition("-")[0]
    if not (folder / _LOCK).exists():  # killed before it had a lock, or about to take one
        return not pid.isdigit() or not _is_alive(int(pid))
    try:
        os.close(_lock(folder))
    except OSError:  # it is held
        return False
    return True


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


def _above() -> Path:
    return Path(tempfile.gettempdir()) / f"imagen-precompute-{os.getuid()}"


def _remove(folder: Path, pid: int) -> None:
    if pid == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
