"""The files of one group of a manifest as columns: about 60 bytes per file."""

import numpy as np

from imagen_core.store.layout import revision_of
from imagen_core.store.records import FileEntry


class FileColumns:
    """Size, rows and digest of one group's files, shard by shard; size -1 = no file. Revisions where not 0."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.rows: list[int] = []
        self.digests = bytearray()
        self.revisions: dict[int, int] = {}

    def append(self, entry: FileEntry | None) -> None:
        """Adds the file of the next shard; None if it has none."""
        if entry is not None and (revision := revision_of(entry.path)):
            self.revisions[len(self.sizes)] = revision
        self.sizes.append(-1 if entry is None else entry.bytes)
        self.rows.append(0 if entry is None else entry.rows)
        self.digests += bytes(32) if entry is None else bytes.fromhex(entry.sha256)

    def freeze(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, int]]:
        """Sizes and rows, int64 (n,); digests, uint8 (n, 32); revisions by position."""
        digests = np.frombuffer(bytes(self.digests), dtype=np.uint8).reshape(-1, 32)
        return np.array(self.sizes, np.int64), np.array(self.rows, np.int64), digests, self.revisions
