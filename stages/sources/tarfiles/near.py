"""Copies of tars on the disk of the machine that indexes them, so that their bytes come once."""

import shutil
from collections import OrderedDict
from pathlib import Path

from imagen_core.far import call, download, open_filesystem
from imagen_core.far.ranges import has_ranges
from pipeline.storage.scratch import scratch, temporary_file

_MOST_BYTES = 8 * 2**30
_MOST_OF_FREE = 0.25


class NearTars:
    """The tars that the driver of a run read last, at most 8 GiB and a quarter of the free disk. Workers on the same
    machine read them from there, others from the object store.

    Picklable: a copy has the paths, and makes none.
    """

    def __init__(self) -> None:
        self._copies: OrderedDict[str, tuple[Path, int]] = OrderedDict()
        self.is_active = False
        """Whether tars are copied: a plan reads their headers alone."""

    def begin(self) -> None:
        """Copies tars from now on."""
        self.is_active = True

    def __getstate__(self) -> dict[str, object]:
        return {"_copies": OrderedDict(), "is_active": False}

    def copied(self, path: str, size: int | None) -> Path | None:
        """A copy of a tar; None of one that is not on an object store or too large, and before `begin`."""
        if not self.is_active or size is None or not has_ranges(path):
            return None
        if path not in self._copies:
            room = min(_MOST_BYTES, int(shutil.disk_usage(scratch()).free * _MOST_OF_FREE))
            while self._copies and sum(taken for _, taken in self._copies.values()) + size > room:
                self._copies.popitem(last=False)[1][0].unlink(missing_ok=True)
            if size > room:
                return None
            local = temporary_file(self, "tar-")
            filesystem, plain = call(path, "read", lambda: open_filesystem(path))
            download(filesystem, plain, path, local, size)
            self._copies[path] = local, size
        return self._copies[path][0]
