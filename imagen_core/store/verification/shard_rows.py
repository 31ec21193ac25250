"""The samples of a shard, which its other files must agree with."""

from dataclasses import dataclass

import numpy as np

from imagen_core.store.files.images import ImageFile


@dataclass(frozen=True, slots=True)
class ShardRows:
    """What the `samples` file of a shard says of each row."""

    keys: list[str]
    sha256: list[str]
    sizes: np.ndarray
    """Width and height of each original, int (2, n)."""
    captions: list[str]
    """The distinct captions, by caption id."""
    removed: frozenset[int]
    """Removed rows, which may be erased in all, some or none of the files."""
    removed_ids: frozenset[int]
    """Caption ids that only removed rows have."""

    def wrong_shapes(self, images: ImageFile) -> str | None:
        """Which images have another shape than the aspect-ratio bucket of their original; None if none."""
        rows = images.misshapen(*self.sizes) if len(self.keys) == images.num_rows else []
        rows = [row for row in rows if row not in self.removed]
        if not rows:
            return None
        where = f"the first in row {rows[0]} ({self.keys[rows[0]]!r})"
        return f"{len(rows)} images have not the shape of their bucket, {where}"
