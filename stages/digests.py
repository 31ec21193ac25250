"""Digests of large files, which are read once and remembered on this machine."""

import json
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.fingerprint import digest
from pipeline.storage.files import write_json

log = logging.getLogger(__name__)

Version = tuple[int, ...]


def version_of(path: Path) -> Version:
    """What changes when a file is written again, or replaced: inode, size in bytes, and both times in ns."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def remembered_digest(files: Iterable[Path], compute: Callable[[], str]) -> str:
    """The digest of the content of some files; computed once for as long as none of them changes.

    It is kept in `~/.cache/imagen-precompute`, which is optional: without it the files are read again.

    Args:
        files: absolute paths; their order counts.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "imagen-precompute"
    files = list(files)
    entry = cache / f"{digest([[str(path), *version_of(path)] for path in files])}.json"
    with suppress(OSError, ValueError, KeyError):
        return json.loads(entry.read_text(encoding="utf-8"))["sha256"]
    value = compute()
    try:
        write_json(entry, {"path": str(files[0]) if files else "", "sha256": value})
    except OSError as error:
        log.warning("%s: cannot be written (%s), so files are hashed at every start", cache, error.strerror)
    return value
