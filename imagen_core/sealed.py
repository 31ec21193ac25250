"""Files that prove their own content: a JSON object, or a safetensors file, with the SHA-256 of everything else in it.

Files without one, of earlier versions, are read as they are.
"""

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagen_core.files import write_durably

SEAL = "sha256"
"""Key of the digest; the last one of a JSON object, or one of a safetensors file's metadata."""
UNSEALED = "0" * 64
"""What stands in a safetensors file's metadata until `seal_tensors`."""
_TAIL = '"sha256": "%s"\n}\n'
_IN_HEADER = re.compile(rb'"sha256":"(.{64})"', re.DOTALL)


class DamagedFileError(ValueError):
    """A file cannot be read, or was changed since it was written; the message begins with its path."""


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically and durably, with the digest of its text as the last field. One process only
    may write it at a time."""
    write_durably(path, sealed(value))


def sealed(value: Mapping[str, Any]) -> bytes:
    """The content of a file for `read_sealed`."""
    text = json.dumps(value, indent=1, ensure_ascii=False).removesuffix("}").rstrip()
    start = text + ("\n " if text == "{" else ",\n ")
    data = start.encode("utf-8", "backslashreplace")  # a lone surrogate becomes its JSON escape
    return data + (_TAIL % hashlib.sha256(data).hexdigest()).encode()


def read_sealed(path: Path) -> dict[str, Any]:
    """The object of `write_sealed`, without the digest.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it cannot be read, is no JSON object, or does not match its digest.
    """
    try:
        data = path.read_bytes()
        value = json.loads(data.decode())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path}: cannot be read (it is no JSON object)")
    if value.pop(SEAL, None) is None:
        return value
    start = data[: -len(_TAIL % UNSEALED)]
    if data[len(start) :] != (_TAIL % hashlib.sha256(start).hexdigest()).encode():
        raise DamagedFileError(f"{path}: was changed since it was written (its sha256 is another one)")
    return value


def seal_tensors(path: Path) -> None:
    """Puts the digest into a safetensors file whose metadata have UNSEALED in its place."""
    place, _, hasher = _unsealed(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(hasher.hexdigest().encode())


def check_tensors(path: Path) -> None:
    """Checks a file of `seal_tensors`; one without a digest is not checked.

    Raises:
        DamagedFileError: it was changed since it was written.
    """
    place, written, hasher = _unsealed(path)
    if place and hasher.hexdigest() != written:
        raise DamagedFileError(f"{path}: was changed since it was written (its sha256 is another one)")


def _unsealed(path: Path) -> "tuple[int, str, hashlib._Hash]":
    """Where the digest stands in a safetensors file (0: nowhere), what it is, and the digest of the file with UNSEALED
    instead."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(struct.unpack("<Q", size)[0])
        found = _IN_HEADER.search(header)
        if found is None:
            return 0, "", hasher
        hasher.update(size + header[: found.start(1)] + UNSEALED.encode() + header[found.end(1) :])
        hashlib.file_digest(file, lambda: hasher)
    return 8 + found.start(1), found[1].decode("latin-1"), hasher
