"""Files that are either complete or absent: write under a temporary name, fsync, rename, fsync the folder.

Every file that a command writes for good goes through here, so that a kill, a full disk and a loss of power leave the
old file or the new one.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, LockedError

TEMPORARY_MARK = ".tmp-"
RESTORE = "restore it from a copy, or delete it"
_LOCK = ".lock"
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL, errno.EXDEV)
"""What file systems without hard links answer: exFAT, FAT, many FUSE mounts."""


def temporary_name(final: Path, owner: str = "") -> Path:
    """A unique sibling of `final`; it keeps the suffix, which some writers depend on.

    Args:
        owner: begins the name, for `remove_temporaries`.
    """
    return final.with_name(f"{TEMPORARY_MARK}{owner}{uuid.uuid4().hex[:12]}-{final.name}")


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, durably; nothing happens if it exists."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync_path(path.parent)


def commit_file(temporary: Path, final: Path) -> None:
    """Makes a finished temporary file durable, then visible under its final name, atomically."""
    with _named(final):
        fsync_path(temporary)
        os.replace(temporary, final)
        fsync_path(final.parent)


def create_file(temporary: Path, final: Path) -> bool:
    """Makes a finished temporary file durable, then visible under a name that is not taken.

    Without hard links the name is taken first, and the content follows: a reader may see an empty file in between.

    Returns:
        False if the name is taken; that file stays as it is.
    """
    with _named(final):
        fsync_path(temporary)
        try:
            os.link(temporary, final)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return False
            os.replace(temporary, final)
        fsync_path(final.parent)
    return True


def commit_folder(temporary: Path, final: Path) -> None:
    """The same as `commit_file` for a folder of files; `final` is absent, or empty."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            fsync_path(Path(folder) / name)
        fsync_path(Path(folder))
    os.replace(temporary, final)
    fsync_path(final.parent)


@contextmanager
def unfinished_folder(target: Path, option: str = "--out", *, resume: bool = False) -> Iterator[Path]:
    """A hidden folder next to `target`, which the caller fills and hands to `commit_folder`; else it is deleted.

    Its name is always the same, so that the next call clears up after one that was killed.

    Args:
        target: where the folder, or a file out of it, will be.
        option: names the place in the error.
        resume: what a killed or failed call left stays in the folder; otherwise it is empty.
    Raises:
        LockedError: another process of this machine makes the same folder.
    """
    target = target.absolute()
    folder = target.with_name(f"{TEMPORARY_MARK}{target.name}")
    lock = _open_locked(folder)
    if lock is None:
        raise LockedError(f"{option} {target}: another process is writing it; wait for its end, then run this again")
    try:
        if not resume:
            _empty(folder)
        yield folder
    finally:
        if not resume and _is_at(folder, lock):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _open_locked(folder: Path) -> int | None:
    """An open descriptor of the folder, which is made if there is none, with its lock; None if that is held.

    The system takes the lock back when the process ends, and it moves along when the folder is renamed.
    """
    if folder.is_file():
        remove_if_present(folder)  # of an export by an earlier version
    while True:
        make_folder(folder)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # renamed or deleted meanwhile
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks of folders, such as NFS
            pass
        if _is_at(folder, descriptor):
            return descriptor
        os.close(descriptor)


def _is_at(folder: Path, descriptor: int) -> bool:
    """Whether the open folder still has its name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_json(path: Path) -> Any:
    """The value in a JSON file; None if there is no such file.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return parse_json(path.read_bytes(), path)
    except FileNotFoundError:
        return None


def parse_json(data: bytes, file: str | os.PathLike[str], remedy: str = RESTORE) -> Any:
    """The value in the bytes of a JSON file.

    Raises:
        ConfigError: it is damaged; names the file.
    """
    try:
        return json.loads(data)
    except ValueError as error:
        raise damaged(file, error, remedy) from error


def damaged(file: str | os.PathLike[str], error: object, remedy: str = RESTORE) -> ConfigError:
    """The error for a small file that does not hold what it should."""
    return ConfigError(f"{os.fspath(file)}: is damaged ({error}); {remedy}")


def write_json(path: Path, value: object) -> None:
    """Writes a small JSON file atomically and durably."""
    write_text(path, json_text(value))


def json_text(value: object) -> str:
    """A JSON value as all small files of a run have it: the same value gives the same text."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Writes a small text file atomically and durably."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a small file atomically and durably."""
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        with _named(path):
            temporary.write_bytes(data)
        commit_file(temporary, path)
    finally:
        remove_if_present(temporary)


def remove_if_present(path: Path) -> None:
    """Deletes a temporary file that may be gone; it is no error if the disk does not let it go, as the next run tries
    again."""
    with suppress(OSError):
        path.unlink()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_temporaries(folder: Path, linked: str = "", owner: str = "") -> int:
    """Deletes unfinished files of killed processes anywhere under `folder`; returns their number.

    Folders of other runs, which have a `.lock`, are left alone. Links to folders are followed directly below the
    subfolder `linked`, so that the groups of a store may lie on other disks.

    Args:
        owner: only those whose names begin with it; see `temporary_name`.
    """
    found = _temporaries(folder, linked) if folder.is_dir() else ()
    leftovers = [path for path in found if path.name.startswith(TEMPORARY_MARK + owner)]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            remove_if_present(path)
    return len(leftovers)


def _temporaries(folder: Path | str, linked: str = "", *, follow: bool = False) -> Iterator[Path]:
    """Streamed: `Path.rglob` would hold a list of each folder's files, 100,000 of them in a large run."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(TEMPORARY_MARK):
                yield Path(entry.path)
            elif entry.is_dir(follow_symlinks=follow or entry.name == linked) and not _is_run(entry.path):
                yield from _temporaries(entry.path, follow=entry.name == linked)


def _is_run(folder: str) -> bool:
    return os.path.exists(f"{folder}/{_LOCK}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the disk name the file that was to be written: those of a write have no name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def fsync_path(path: Path) -> None:
    """Makes the bytes of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
