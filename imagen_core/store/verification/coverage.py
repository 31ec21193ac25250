"""Accounts for every input row: it is one sample, or dropped for one reason, or was tried again in a later shard."""

from collections import Counter

import numpy as np

from imagen_core.store.files.samples import SamplesFile
from imagen_core.store.layout import RETRIED, shard_name
from imagen_core.store.manifest import Manifest
from imagen_core.store.records import ShardEntry

_MAX_NAMED_SHARDS = 10


class Coverage:
    """Sums over the shards of a store; memory grows by 16 bytes per row that was tried again.

    Attributes:
        dropped: number of input rows that did not become samples, by the reason of their last try.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.dropped: Counter[str] = Counter()
        self._total = manifest.input_rows
        self._first_tries = self._accounted = 0
        self._known = manifest.index
        self._failed = manifest.failed_shards
        retried = np.concatenate([*manifest.retries.values(), np.zeros((0, 2), np.int64)])
        self._retried = retried[np.lexsort((retried[:, 1], retried[:, 0]))]  # by shard, then row

    @property
    def input_rows(self) -> int:
        """Rows of the source: as the manifest says, or else the sum over the shards added."""
        return self._first_tries if self._total is None else self._total

    @property
    def unaccounted(self) -> int:
        """Input rows that are neither samples (excluded ones included) nor dropped; negative if some count twice."""
        return self.input_rows - self._accounted

    def add(self, shard: ShardEntry, samples: SamplesFile) -> list[str]:
        """Counts a shard's input rows; returns a message for each kind of wrong ones."""
        total = samples.num_input_rows
        if total is None:
            return ["does not say how many input rows it was made from"]
        dropped = [row for rows in samples.dropped.values() for row in rows]
        rows = np.array([*samples.column("input_row"), *dropped], dtype=np.int64)
        inside = rows[(rows >= 0) & (rows < total)]
        times = np.bincount(inside, minlength=total)
        retried = self._retried_rows(shard.index)
        wrong = [
            (np.flatnonzero(times == 0), "neither a sample nor dropped"),
            (np.flatnonzero(times > 1), "there more than once"),
            (np.setdiff1d(rows, inside), f"not below {total}, the number of input rows"),
            (np.setdiff1d(retried, dropped), "tried again in a later shard, but not dropped here"),
            (retried[1:][retried[1:] == retried[:-1]], "tried again in two later shards"),
            (np.setdiff1d(samples.dropped.get(RETRIED, []), retried), "dropped as tried again, but in no later shard"),
        ]
        lost = len(wrong[-1][0])
        self._accounted += int(np.count_nonzero(times)) - len(np.intersect1d(retried, dropped)) - lost
        for reason, listed in samples.dropped.items():
            self.dropped[reason] += len(np.setdiff1d(listed, retried))
        problems = [f"input row {rows[0]} is {what}; {len(rows)} such" for rows, what in wrong if len(rows)]
        if not shard.retry_of:
            self._first_tries += total
        elif len(shard.retry_of) != total:
            problems.append(f"{total} input rows, the manifest names {len(shard.retry_of)} that were tried again")
        return problems

    def finish(self) -> list[str]:
        """Messages about the store as a whole, once all shards are added."""
        problems = []
        unknown = np.setdiff1d(self._retried[:, 0], self._known)
        if len(unknown):
            problems.append(f"rows of shard {unknown[0]} were tried again, but there is no such shard")
        if self._first_tries != self.input_rows:
            named = ", ".join(map(shard_name, self._failed[:_MAX_NAMED_SHARDS]))
            more = ", ..." if len(self._failed) > _MAX_NAMED_SHARDS else ""
            why = f"{len(self._failed)} shards failed ({named}{more})" if named else "some are missing"
            problems.append(
                f"{self.input_rows} input rows, but the shards have {self._first_tries}: {why}; "
                "run the same pipeline command again"
            )
        return problems

    def _retried_rows(self, shard: int) -> np.ndarray:
        first, last = np.searchsorted(self._retried[:, 0], [shard, shard + 1])
        return self._retried[first:last, 1]
