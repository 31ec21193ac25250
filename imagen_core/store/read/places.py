"""Which rows are samples: from a sample's index to its shard and row."""

from bisect import bisect_right
from collections.abc import Collection, Mapping

import numpy as np


class Places:
    """The rows of all shards, one after another, without the excluded ones; `len` of them."""

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
        """Shard position and row of a sample; index in [0, len)."""
        shard = bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        for excluded in self._excluded.get(shard, ()):
            row += excluded <= row
        return shard, row

    def of_samples(self, values: np.ndarray, samples: range) -> np.ndarray:
        """The values of some samples, from those of all rows."""
        is_sample = np.ones(len(values), np.bool_)
        firsts = np.cumsum(self._rows) - self._rows
        for shard, excluded in self._excluded.items():
            is_sample[firsts[shard] + np.array(list(excluded), np.int64)] = False
        return values[is_sample][samples.start : samples.stop]

    def bounds(self, samples: range) -> np.ndarray:
        """Where the shards of some samples start and end, int64, rising from samples.start to samples.stop."""
        ends = np.array(self._ends, dtype=np.int64)
        inside = ends[(ends > samples.start) & (ends < samples.stop)]
        return np.unique(np.concatenate([[samples.start], inside, [samples.stop]]))
