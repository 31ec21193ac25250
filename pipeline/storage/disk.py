"""Recognises what a machine refuses whatever the data are, and says what to do.

A disk that is full, over its quota, read-only or broken, too many open files, missing rights: one message for all
commands, with exit code 4.
"""

import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imagen_core.far import StorageError
from pipeline.errors import MachineError, PipelineError, storage_error

_NO_DATA = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
_BROKEN = (errno.EIO,)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_OWN = "ext2 ext3 ext4 xfs btrfs zfs f2fs bcachefs tmpfs ramfs overlay vfat exfat".split()  # noqa: SIM905
_AGAIN = "and run the same command again: it resumes."


def takes_no_data(error: BaseException) -> bool:
    """Whether no other shard can succeed: a disk is full, over its quota or read-only, or too many files are open."""
    return _number(error, (*_NO_DATA, *_TOO_MANY_FILES)) is not None


def disk_message(error: BaseException, folder: Path) -> str | None:
    """Names the file or the file system, and the remedy; None for an error that the machine is not to blame for.

    Args:
        folder: the folder that was written to, if the error does not name a file.
    """
    number = _number(error, (*_NO_DATA, *_TOO_MANY_FILES, *_BROKEN))
    if number is None and isinstance(error, OSError) and error.errno in _FORBIDDEN:
        number = error.errno
    if number is None:
        return None
    path = _existing(error, folder)
    said = f"{path}: {type(error).__name__}: {error}\n"
    if number in _NO_DATA:
        return f"{said}{_room(path)} Make room there, or make it writable, {_AGAIN}"
    if number in _TOO_MANY_FILES:
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"{said}This process may have {limit} files open (ulimit -n). Raise the limit, as with ulimit -n "
            f"{min(max(4096, 4 * limit), most)}, {_AGAIN}"
        )
    if number in _BROKEN:
        return f"{said}The disk, or the connection to it, failed (dmesg may say why). Mend it, {_AGAIN}"
    return f"{said}This user may not do that. Change the owner or the rights, or choose another folder, {_AGAIN}"


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turns errors of the machine within the block into one that says what to do.

    Raises:
        MachineError: the disk takes no more data, or storage cannot be reached, among others.
    """
    try:
        yield
    except MachineError:
        raise
    except StorageError as error:
        raise storage_error(error) from error
    except PipelineError as error:
        if error.__cause__ is None or not takes_no_data(error.__cause__):
            raise
        raise MachineError(disk_message(error.__cause__, folder)) from error  # else it reads as damage
    except Exception as error:
        if (message := disk_message(error, folder)) is not None:
            raise MachineError(message) from error
        raise


def file_system_type(folder: Path) -> str:
    """Type of the file system of a folder, such as `ext4` or `nfs4`; "" where it cannot be told."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:  # not Linux
        return ""
    place = folder.resolve()
    above = [(len(point), kind) for _, point, kind, *_ in mounts if place.is_relative_to(point.replace("\\040", " "))]
    return max(above, default=(0, ""))[1]


def is_own_file_system(folder: Path) -> bool:
    """Whether a folder is certainly on a disk that only this machine uses: not where the type is unknown."""
    return file_system_type(folder) in _OWN


def _number(error: BaseException, numbers: tuple[int, ...]) -> int | None:
    """Which of these an error is; some libraries say so only in the text, or as the cause of another error."""
    while True:
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in numbers:
                return error.errno
        elif not isinstance(error, PipelineError):
            text = str(error)
            for number in numbers:
                if os.strerror(number) in text or re.search(rf"errno[ =]+{number}\b", text, re.IGNORECASE):
                    return number
        if error.__cause__ is None:
            return None
        error = error.__cause__


def _existing(error: BaseException, folder: Path) -> Path:
    """The folder that exists above the file that an error names."""
    named = getattr(error, "filename", None)
    path = Path(os.fsdecode(named)).absolute() if isinstance(named, str | bytes | os.PathLike) else folder.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _room(path: Path) -> str:
    from pipeline.units import human_bytes

    usage, mount = shutil.disk_usage(path), mount_point(path)
    return f"{human_bytes(usage.free)} of {human_bytes(usage.total)} are free on the file system at {mount}."


def mount_point(folder: Path) -> Path:
    """Where the file system of an existing folder is mounted."""
    mount = folder.resolve()
    while not mount.is_mount():
        mount = mount.parent
    return mount
