"""The originals of a shard that are still staged: while it is at work, or with `keep_originals`."""

import tarfile
import threading
from collections import OrderedDict
from dataclasses import dataclass

from pipeline.storage import LocalStorage
from pipeline.storage.record import shard_name
from pipeline.storage.run_folder import RunFolder
from stages.precompute.fetch import ORIGINALS
from stages.precompute.originals import OriginalsReader

_MOST_SHARDS = 16
_MOST_BYTES = 32 * 2**20
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
    """Reads staged tars of a run on a local folder. Safe for threads; keeps the entries of 16 shards."""

    def __init__(self, run: RunFolder):
        self._run = run
        self._mutex = threading.Lock()
        self._known: OrderedDict[tuple[int, str], dict[int, Staged]] = OrderedDict()

    def _path(self, shard: int) -> str:
        return f"staging/{ORIGINALS}/{shard_name(shard)}.tar"

    def rows(self, shard: int) -> dict[int, Staged]:
        """The originals of a shard by row; none if it is not staged.

        Raises:
            OSError, ValueError, KeyError: the tar is damaged.
        """
        storage = self._run.storage
        version = storage.version(self._path(shard)) if isinstance(storage, LocalStorage) else None
        if version is None:
            return {}
        with self._mutex:
            if (shard, version) not in self._known:
                self._known[shard, version] = self._read(shard)
                while len(self._known) > _MOST_SHARDS:
                    self._known.popitem(last=False)
            return self._known[shard, version]

    def _read(self, shard: int) -> dict[int, Staged]:
        copy = self._run.storage.copy(self._path(shard))
        try:
            with OriginalsReader(copy) as originals:
                return {
                    each.row: Staged(each.url, each.captions, each.offset, each.size) for each in originals.entries
                }
        except tarfile.TarError as error:
            raise ValueError(f"{self._path(shard)}: {error}") from error
        finally:
            self._run.storage.release(copy)

    def image(self, shard: int, row: int) -> tuple[bytes, str] | None:
        """Bytes and media type of a staged original; None if it is not staged, or nothing that a browser shows.

        Raises:
            OSError, ValueError, KeyError: the tar is damaged, or was deleted meanwhile.
        """
        entry = self.rows(shard).get(row)
        if entry is None or not entry.is_image:
            return None
        data = self._run.storage.read_part(self._path(shard), entry.offset, entry.size)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return data, "image/webp"
        return next(((data, kind) for magic, kind in _TYPES.items() if data.startswith(magic)), None)
