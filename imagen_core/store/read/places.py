"""Which rows are samples: from a sample's index to its shard and row."""

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np


class Places(Protocol):
    """Where the samples of a store are; `len` of them."""

    digest: str | None
    """Of the chosen rows; None where no row was chosen by a condition."""

    def __len__(self) -> int: ...

    def locate(self, index: int) -> tuple[int, int]:
        """Shard position and row of a sample; index in [0, len)."""
        ...

    def of_samples(self, values: np.ndarray, samples: range) -> np.ndarray:
        """The values of some samples, from those of all rows."""
        ...

    def bounds(self, samples: range) -> np.ndarray:
        """Where the shards of some samples start and end, int64, rising from samples.start to samples.stop."""
        ...


class AllPlaces:
    """The rows of all shards, one after another, without the excluded ones."""

    digest: str | None = None

    def __init__(self, rows: np.ndarray, excluded: Mapping[int, Collection[int]]) -> None:
        """`rows` of each shard; `excluded`: by shard position, its excluded rows in rising order."""
        self._rows, valid = rows, rows.copy()
        for shard, rows_excluded in excluded.items():
            valid[shard] -= len(rows_excluded)
        self._ends: list[int] = np.cumsum(valid).tolist()  # samples up to and including each shard
        self._excluded = excluded

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[int, int]:
        shard = bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        for excluded in self._excluded.get(shard, ()):
            row += excluded <= row
        return shard, row

    def of_samples(self, values: np.ndarray, samples: range) -> np.ndarray:
        is_sample = np.ones(len(values), np.bool_)
        firsts = np.cumsum(self._rows) - self._rows
        for shard, excluded in self._excluded.items():
            is_sample[firsts[shard] + np.array(list(excluded), np.int64)] = False
        return values[is_sample][samples.start : samples.stop]

    def bounds(self, samples: range) -> np.ndarray:
        return _bounds(np.array(self._ends, dtype=np.int64), samples)


class ChosenPlaces:
    """Of the rows of all shards those that a condition chose, without the excluded ones: 4 bytes of memory each."""

    def __init__(self, rows: np.ndarray, excluded: Mapping[int, Collection[int]], chosen: np.ndarray) -> None:
        """`chosen`: bool (sum of rows,); see `AllPlaces` for the others."""
        self._row_ends = np.cumsum(rows, dtype=np.int64)
        kept = chosen.copy()
        for shard, rows_excluded in excluded.items():
            kept[int(self._row_ends[shard] - rows[shard]) + np.array(list(rows_excluded), np.int64)] = False
        narrow = len(kept) <= np.iinfo(np.uint32).max
        self._rows = np.flatnonzero(kept).astype(np.uint32 if narrow else np.int64)
        self.digest: str | None = hashlib.sha256(self._rows.astype("<u8").tobytes()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._rows)

    def locate(self, index: int) -> tuple[int, int]:
        row = int(self._rows[index])
        shard = int(np.searchsorted(self._row_ends, row, side="right"))
        return shard, row - (int(self._row_ends[shard - 1]) if shard else 0)

    def of_samples(self, values: np.ndarray, samples: range) -> np.ndarray:
        return values[self._rows[samples.start : samples.stop]]

    def bounds(self, samples: range) -> np.ndarray:
        return _bounds(np.searchsorted(self._rows, self._row_ends).astype(np.int64), samples)


def _bounds(ends: np.ndarray, samples: range) -> np.ndarray:
    inside = ends[(ends > samples.start) & (ends < samples.stop)]
    return np.unique(np.concatenate([[samples.start], inside, [samples.stop]]))
