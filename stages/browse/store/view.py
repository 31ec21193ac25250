"""A store as the pages see it: opened again when it was written again, and read by one request at a time."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np

from imagen_core.store import MANIFEST_NAME, Store, StoreError, StoreFolder
from pipeline.storage.run_folder import RunFolder
from stages.browse.places import Place
from stages.browse.store.table import SamplesTable
from stages.duplicates.find import read_duplicates

_OPEN_SHARDS = 16
_MOST_SHARD = 2**62


class StoreView:
    """The store of a place, which a run may be making, compacting or removing from."""

    def __init__(self, place: Place):
        self.place = place
        self._folder = StoreFolder(place.url)
        self._lock = threading.Lock()
        self._version: str | None = None
        self._store: Store | None = None
        self._table: SamplesTable | None = None

    @contextmanager
    def reading(self) -> Iterator[Store]:
        """The store as it is now, for the thread in the block alone.

        Raises:
            StoreError: there is none (yet), or it is damaged.
        """
        with self._lock:
            yield self._opened()

    @contextmanager
    def table(self) -> Iterator[SamplesTable]:
        """The table of its samples, which may still be filling; raises as `reading`."""
        with ExitStack() as stack:
            with self._lock:
                self._opened()
                assert self._table is not None
                table = stack.enter_context(self._table.used())
            yield table

    @property
    def run(self) -> RunFolder | None:
        """The run that the store is of."""
        return None if self.place.run is None else RunFolder(self.place.url.rpartition("/")[0])

    def _opened(self) -> Store:
        version = self._folder.version(MANIFEST_NAME)
        if version is None and self._store is None:
            raise StoreError(f"{self._folder.url}: no manifest.json; a run writes it when all shards are finished")
        if self._store is None or version not in (None, self._version):
            store = Store.open(self.place.url, max_open_shards=_OPEN_SHARDS)
            if self._table is not None:
                self._table.close()
            self._store, self._version = store, version
            self._table = SamplesTable(Store.open(self.place.url, max_open_shards=1), self._duplicates)
        return self._store

    def _duplicates(self) -> Mapping[tuple[int, int], str]:
        run = self.run
        if run is None:
            return {}
        return {(entry["shard"], entry["row"]): entry["reason"] for entry in read_duplicates(run)}


def position_of(store: Store, shard: int, row: int) -> int:
    """Position of a shard in the manifest.

    Raises:
        LookupError: the store has no such sample, or it was removed.
    """
    manifest = store.manifest
    position = int(np.searchsorted(manifest.index, min(shard, _MOST_SHARD)))
    if position == manifest.num_shards or manifest.index[position] != shard or not 0 <= row < manifest.rows[position]:
        raise LookupError(f"the store has no sample in row {row} of shard {shard}")
    reason = manifest.excluded.get(position, {}).get(row)
    if reason is not None or (position, row) in store.removed_since:
        raise LookupError(f"row {row} of shard {shard} is no sample: {reason or 'removed'}")
    return position
