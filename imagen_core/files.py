"""Local files: their digest, writing them durably, and the same bytes for the same content."""

import errno
import hashlib
import json
import os
import struct
import uuid
from pathlib import Path

_METADATA = "__metadata__"
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL, errno.EXDEV)
"""What file systems without hard links answer: exFAT, FAT, many FUSE mounts."""


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 lowercase hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share(path: str | os.PathLike[str]) -> None:
    """Gives a file of this process the mode that the umask asks for; safetensors writes for the owner alone."""
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def fsync_path(path: Path) -> None:
    """Makes the bytes of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, durably; nothing happens if it exists."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_path(path.parent)


def temporary_name(final: Path) -> Path:
    """A unique sibling of a file, to write it to."""
    return final.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{final.name}")


def commit(temporary: Path, final: Path) -> None:
    """Makes a finished file durable, then visible under its final name, atomically."""
    fsync_path(temporary)
    os.replace(temporary, final)
    fsync_path(final.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Creates or replaces a small file: after a kill or a loss of power it is the old one or the new one."""
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(data)
        commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def create_durably(path: Path, data: bytes) -> bool:
    """Creates a small file; False if it exists, and then it stays unchanged.

    Without hard links the name is taken first, and the content follows: a reader may see an empty file in between.
    """
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(data)
        fsync_path(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return False
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)
    return True


def append_line(path: Path, line: str) -> None:
    """Appends a line to a text file, durably; one that a kill left unfinished before it is ended first."""
    make_folder(path.parent)
    with path.open("ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def sort_metadata(path: str | os.PathLike[str]) -> None:
    """Orders the metadata in the header of a safetensors file by key, in place.

    The library writes them in an order that differs from run to run, so that equal tensors give files of different
    digests. The header keeps its length, and the tensors their places.
    """
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        if len(header.get(_METADATA, {})) < 2:
            return
        header[_METADATA] = dict(sorted(header[_METADATA].items()))
        data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(data) > length:
            raise ValueError(f"{path}: its header grew from {length} to {len(data)} bytes")
        file.seek(8)
        file.write(data.ljust(length))
