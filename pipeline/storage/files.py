"""Files that are either complete or absent: write under a temporary name, fsync, rename."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_MARK = ".tmp-"


def temporary_name(final: Path) -> Path:
    """A unique sibling of `final`; it keeps the suffix, which some writers depend on."""
    return final.with_name(f"{TEMPORARY_MARK}{uuid.uuid4().hex[:12]}-{final.name}")


def commit_file(temporary: Path, final: Path) -> None:
    """Makes a finished temporary file durable, then visible under its final name, atomically."""
    _fsync(temporary)
    os.replace(temporary, final)
    _fsync(final.parent)


def read_json(path: Path) -> dict[str, object] | None:
    """The JSON object of a file; None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_json(path: Path, value: object) -> None:
    """Writes a small JSON file atomically and durably."""
    write_text(path, json_text(value))


def json_text(value: object) -> str:
    """A JSON value as all small files of a run have it: the same value gives the same text."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Writes a small text file atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        commit_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_temporaries(folder: Path) -> int:
    """Deletes unfinished files of killed processes anywhere under `folder`; returns their number."""
    leftovers = list(_temporaries(folder)) if folder.is_dir() else []
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(leftovers)


def _temporaries(folder: Path | str) -> Iterator[Path]:
    """Streamed: `Path.rglob` would hold a list of each folder's files, 100,000 of them in a large run."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(TEMPORARY_MARK):
                yield Path(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                yield from _temporaries(entry.path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
