"""A store that is changed while it is read: compaction and removals are followed, other content is refused."""

import time

import numpy as np

from imagen_core.store.errors import StoreError
from imagen_core.store.folder import StoreFolder
from imagen_core.store.layout import MANIFEST_NAME, REMOVED, revision_of
from imagen_core.store.manifest import Manifest, load_manifest
from imagen_core.store.records import FileEntry

LOOK_EVERY_S = 60.0
"""So long a reader goes on with files that were replaced; compaction keeps them longer where it has to."""


class Generations:
    """The manifest with which a reader opened the store, and the one that the store has now.

    Positions, rows and the order of samples stay those of the opening: compaction leaves every row in its place.

    Attributes:
        number: how often the store was another one than before.
        removed: shard position and row of the samples that were removed since the opening.
    """

    def __init__(self, folder: StoreFolder, opened: Manifest) -> None:
        self._folder, self._opened, self._now = folder, opened, opened
        self._version = opened.version
        self._looked = time.monotonic()
        self.number = 0
        self.removed: frozenset[tuple[int, int]] = frozenset()

    def look(self, *, after_s: float = LOOK_EVERY_S) -> None:
        """Follows the store if its manifest was written again, unless the last look was less than `after_s` ago."""
        now = time.monotonic()
        if now - self._looked < after_s:
            return
        self._looked = now
        version = self._folder.version(MANIFEST_NAME)
        if version != self._version and self._follow():
            self._version = version

    @property
    def is_gone(self) -> bool:
        """Whether the store has no manifest now: a run makes some of it again, and its files may be others."""
        return self._folder.version(MANIFEST_NAME) is None

    def _follow(self) -> bool:
        """Takes the manifest that the store has now; False if there is none, or a damaged one."""
        try:
            manifest = load_manifest(self._folder)
        except StoreError:
            return False
        before = (self._now.sha256, self._now.num_removals)
        if (manifest.sha256, manifest.num_removals) != before:
            self._now = manifest
            self.number += 1
            self.removed = frozenset(self._removed())
        return True

    def _removed(self) -> set[tuple[int, int]]:
        found = set()
        for place, rows in self._now.excluded.items():
            (position,) = np.nonzero(self._opened.index == self._now.index[place])
            if len(position):
                before = self._opened.excluded.get(int(position[0]), {})
                found |= {(int(position[0]), row) for row, why in rows.items() if why == REMOVED and row not in before}
        return found

    def entry(self, group: str, position: int) -> FileEntry:
        """The file of a group as it is now, in the shard at a position of the opening.

        Raises:
            StoreError: the store was made again with other content.
        """
        opened = self._opened.file(group, position)
        assert opened is not None, "a shard with samples has all files"
        if self._now is self._opened:
            return opened
        (place,) = np.nonzero(self._now.index == self._opened.index[position])
        found = self._now.file(group, int(place[0])) if len(place) and group in self._now.groups else None
        if found is not None and found.rows == opened.rows:
            is_compacted = revision_of(found.path) > revision_of(opened.path)
            if is_compacted or found.sha256 == opened.sha256:
                return found
        raise StoreError(
            f"{self._folder.path(opened.path)}: the store was made again with other content since it was opened; "
            "start what reads it again"
        )
