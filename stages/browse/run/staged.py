"""The originals of a shard that are still staged: while it is at work, or with `keep_originals`."""

import io
import math
import tarfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, cast

from pipeline.storage import LocalStorage, Storage
from pipeline.storage.record import shard_name
from pipeline.storage.run_folder import RunFolder
from stages.precompute.fetch import ORIGINALS
from stages.precompute.originals import read_originals

_MOST_SHARDS = 16
_MOST_BYTES = 32 * 2**20
_LOCAL_BLOCK, _FAR_BLOCK = 8 * 2**10, 2**20
"""Bytes that are read at once to find the next original; a request to an object store takes as long as some 100 kB."""
_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif", b"BM": "image/bmp"}
"""First bytes of what a browser shows as an image; nothing that may hold scripts."""


@dataclass(frozen=True, slots=True)
class Staged:
    """An original: what came with it, and where in the tar its bytes are."""

    url: str | None
    captions: tuple[str, ...]
    offset: int
    size: int

    @property
    def is_image(self) -> bool:
        """Whether there are bytes; what they are is seen when they are read."""
        return 0 < self.size <= _MOST_BYTES


class StagedOriginals:
    """Reads staged tars of a run, wherever it is. Safe for threads; keeps the entries of 16 shards."""

    def __init__(self, run: RunFolder):
        self._run = run
        self._mutex = threading.Lock()
        self._known: OrderedDict[tuple[int, str], _Index] = OrderedDict()

    def rows(self, shard: int, until: float = math.inf) -> tuple[dict[int, Staged], bool]:
        """The originals of a shard by row, none if it is not staged; and whether these are all of them.

        Args:
            until: when `time.monotonic` is so far, what was not yet read is left to the next call.
        Raises:
            OSError, ValueError, KeyError, PipelineError: the tar is damaged, or cannot be reached.
        """
        storage, path = self._run.storage, _path(shard)
        version = storage.version(path)
        size = None if version is None else storage.size(path)
        if version is None or size is None:
            return {}, True
        with self._mutex:
            index = self._known.setdefault((shard, version), _Index(storage, path, size))
            self._known.move_to_end((shard, version))
            while len(self._known) > _MOST_SHARDS:
                self._known.popitem(last=False)
        try:
            return index.rows(until)
        except Exception:
            with self._mutex:
                self._known.pop((shard, version), None)
            raise

    def image(self, shard: int, row: int, until: float = math.inf) -> tuple[bytes, str] | None:
        """Bytes and media type of a staged original; None if it is not staged, or nothing that a browser shows.

        Raises:
            OSError, ValueError, KeyError, PipelineError: the tar is damaged, or was deleted meanwhile.
        """
        entry = self.rows(shard, until)[0].get(row)
        if entry is None or not entry.is_image:
            return None
        data = self._run.storage.read_part(_path(shard), entry.offset, entry.size)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return data, "image/webp"
        return next(((data, kind) for magic, kind in _TYPES.items() if data.startswith(magic)), None)


class _Index:
    """Where the originals of one tar are, read as far as there was time. Safe for threads."""

    def __init__(self, storage: Storage, path: str, size: int):
        block = _LOCAL_BLOCK if isinstance(storage, LocalStorage) else _FAR_BLOCK
        file = io.BufferedReader(cast(Any, _Ranges(storage, path, size)), block)
        self._path, self._left = path, read_originals(cast(Any, file))
        self._lock = threading.Lock()
        self._rows: dict[int, Staged] = {}
        self._is_whole = False

    def rows(self, until: float) -> tuple[dict[int, Staged], bool]:
        with self._lock:
            try:
                while not self._is_whole and time.monotonic() < until:
                    each = next(self._left, None)
                    if each is None:
                        self._is_whole = True
                    else:
                        self._rows[each.row] = Staged(each.url, each.captions, each.offset, each.size)
            except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self._path}: {error}") from error
            return dict(self._rows), self._is_whole


class _Ranges(io.RawIOBase):
    """A file of a storage for reading, of which each read asks for a range of bytes."""

    def __init__(self, storage: Storage, name: str, size: int):
        self._storage, self._name, self._size, self._at = storage, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        data = self._storage.read_part(self._name, self._at, wanted) if wanted > 0 else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _path(shard: int) -> str:
    return f"staging/{ORIGINALS}/{shard_name(shard)}.tar"
