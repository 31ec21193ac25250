"""Recognises a file system that is full or read-only, names it and says what to do."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import MachineError, PipelineError

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def takes_no_data(error: BaseException) -> bool:
    """Whether a disk is full, over its quota or read-only; some libraries say so only in the text of an error."""
    if getattr(error, "errno", None) in _NUMBERS:
        return True
    return any(os.strerror(number) in str(error) or f"errno = {number}," in str(error) for number in _NUMBERS)


def disk_message(error: BaseException, folder: Path) -> str:
    """Names the file system, its free space, and the remedy.

    Args:
        folder: the folder that was written to, if the error does not name a file.
    """
    from pipeline.units import human_bytes

    named = getattr(error, "filename", None)
    path = Path(os.fsdecode(named)).absolute() if named else folder
    while not path.is_dir() and path != path.parent:
        path = path.parent
    usage, mount = shutil.disk_usage(path), path
    while not mount.is_mount():
        mount = mount.parent
    return (
        f"{path}: {type(error).__name__}: {error}\n"
        f"{human_bytes(usage.free)} of {human_bytes(usage.total)} are free on the file system at {mount}. Make room "
        "there, or make it writable, and run the same command again: it resumes."
    )


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turns errors of a full or read-only disk within the block into one that names it.

    Raises:
        MachineError: the disk takes no more data.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if takes_no_data(error):
            raise MachineError(disk_message(error, folder)) from error
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
