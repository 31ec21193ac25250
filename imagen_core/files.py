"""Local files: their digest, making them durable, and the same bytes for the same content."""

import hashlib
import json
import os
import struct
from pathlib import Path

_METADATA = "__metadata__"


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
    """Makes a folder and those above it, durably; one that exists stays."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_path(path.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Writes a small file under another name, makes it durable and renames it, which is made durable too.

    Whatever happens, the file has its old content or the new one. What a kill leaves, the next write replaces.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


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
