"""The order of an epoch whose batches are of one aspect-ratio bucket each.

Each bucket has a sequence of its own: all of its samples, shuffled (within windows of shards, if there are windows).
The sequence is cut into batches, and the batches of all buckets are shuffled; where there are windows, a batch comes
in the window that has its last sample. What is left at the end of each sequence is a smaller batch; these come last.

An order is a function of (seed, epoch, cut). A cut says how large batches are, and how many samples of each bucket
came before: so an epoch that was begun with batches of another size is continued with the samples that are left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from imagen_core.store.read.order import BATCHES, SHARDS, WINDOW, Ahead, Place, derive_key, permute

MAX_LEFT_OUT = 0.02
"""Largest part of the samples that `drop_last` may leave out of an epoch."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How an epoch is cut into batches.

    Attributes:
        batch_size: samples of a batch over all ranks.
        starts: by bucket, the samples of the epoch that came before this cut.
    """

    batch_size: int
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Epoch:
    """An epoch's shards in their order, and its batches.

    Attributes:
        units: (U,) the shards, or the store as one, in the order of this epoch.
        unit_ends: (U, B) samples of each bucket up to and including each of them.
        window_ends: (W, B) the same for windows of them.
        labels, chunks, sizes: (N,) bucket of each batch, its number within the bucket, and its samples.
        ends: (N,) samples of the epoch up to and including each batch.
    """

    units: np.ndarray
    unit_ends: np.ndarray
    window_ends: np.ndarray
    labels: np.ndarray
    chunks: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray


class BucketedOrder:
    """The samples of an epoch in batches of one bucket; holds 4 bytes a sample, and 16 a batch of the epoch.

    Attributes:
        totals: (B,) samples of each bucket.
    """

    def __init__(
        self,
        buckets: np.ndarray,
        num_buckets: int,
        *,
        bounds: np.ndarray,
        window: int,
        seed: int,
        shuffle: bool,
        place: Place = permute,
    ) -> None:
        """
        Args:
            buckets: (n,) bucket of each sample.
            bounds: rising from 0 to n; shard i has the samples from bounds[i] to bounds[i + 1].
            window: number of shards within which samples are shuffled; 0 shuffles all samples with each other.
            shuffle: False gives the buckets one after another, each in the order of the samples.
            place: how a bucket's samples are taken within a window.
        """
        self._place = place
        self._seed, self._shuffle, self._windowed = seed, shuffle, window > 0
        self._bounds = bounds if window else np.array([0, len(buckets)], np.int64)
        num_units = len(self._bounds) - 1
        self._window = window or num_units
        self._counts = np.zeros((num_units, num_buckets), np.int64)
        self._members = np.empty(len(buckets), np.uint32 if len(buckets) <= 1 << 32 else np.int64)
        for unit in range(num_units):
            start, stop = int(self._bounds[unit]), int(self._bounds[unit + 1])
            own = buckets[start:stop]
            self._members[start:stop] = np.argsort(own, kind="stable") + start
            self._counts[unit] = np.bincount(own, minlength=num_buckets)
        self._firsts = self._bounds[:-1, None] + np.cumsum(self._counts, axis=1) - self._counts
        self.totals = self._counts.sum(axis=0)
        self._plan: tuple[int, Cut, _Epoch] | None = None
        self._next: tuple[tuple[int, Cut, int], tuple[int, int]] | None = None
        self._ahead = [Ahead(int(total), partial(self._samples, bucket)) for bucket, total in enumerate(self.totals)]

    def uncut(self, batch_size: int) -> Cut:
        """The cut of an epoch from its beginning."""
        return Cut(batch_size, (0,) * len(self.totals))

    def next_batch(self, epoch: int, cut: Cut, position: int) -> tuple[int, int]:
        """Bucket and size of the batch that comes after `position` samples; the size is 0 at the end of the epoch."""
        where = (epoch, cut, position)
        if self._next is None or self._next[0] != where:  # a loader asks several times
            plan = self._planned(epoch, cut)
            batch = int(plan.ends.searchsorted(position, side="right"))
            found = (int(plan.labels[batch]), int(plan.sizes[batch])) if batch < len(plan.ends) else (0, 0)
            self._next = where, found
        return self._next[1]

    def indices(self, epoch: int, cut: Cut, positions: np.ndarray) -> np.ndarray:
        """The sample at each of some rising positions of an epoch, int64."""
        plan = self._planned(epoch, cut)
        batches = plan.ends.searchsorted(positions, side="right")
        found = np.empty(len(positions), np.int64)
        for batch in dict.fromkeys(batches.tolist()):
            chosen, bucket = batches == batch, int(plan.labels[batch])
            within = positions[chosen] - (plan.ends[batch] - plan.sizes[batch])
            sequence = cut.starts[bucket] + plan.chunks[batch] * cut.batch_size + within
            found[chosen] = self._ahead[bucket].samples(epoch, sequence)
        return found

    def consumed(self, epoch: int, cut: Cut, position: int) -> tuple[int, ...]:
        """Samples of each bucket among the first `position` of an epoch.

        Raises:
            ValueError: no batch ends there, or the cut is not one of these buckets.
        """
        if len(cut.starts) != len(self.totals) or (np.array(cut.starts) > self.totals).any():
            raise ValueError(
                f"loader state has starts {list(cut.starts)}, but the buckets have {self.totals.tolist()}"
            )
        plan = self._planned(epoch, cut)
        done = int(plan.ends.searchsorted(position, side="right"))
        if position != (plan.ends[done - 1] if done else sum(cut.starts)):
            raise ValueError(
                f"position {position} of epoch {epoch}: no batch of these aspect-ratio buckets ends there; take a "
                "state of this loader"
            )
        sums = np.bincount(plan.labels[:done], plan.sizes[:done], minlength=len(self.totals))
        return tuple((np.array(cut.starts) + sums.astype(np.int64)).tolist())

    def num_batches(self, batch_size: int, *, full_only: bool) -> int:
        """Batches in a complete epoch."""
        whole, left = np.divmod(self.totals, batch_size)
        return int(whole.sum()) if full_only else int(whole.sum() + np.count_nonzero(left))

    def _samples(self, bucket: int, epoch: int, sequence: np.ndarray) -> np.ndarray:
        """The samples at these places of a bucket's sequence, which no cut changes."""
        assert self._plan is not None
        assert self._plan[0] == epoch
        plan = self._plan[2]
        placed, ends = sequence.copy(), plan.window_ends[:, bucket]
        windows = ends.searchsorted(sequence, side="right")
        for window in np.unique(windows).tolist() if self._shuffle else ():
            chosen, first = windows == window, int(ends[window - 1]) if window else 0
            key = derive_key(self._seed, epoch, WINDOW, window, bucket)
            placed[chosen] = self._place(sequence[chosen] - first, int(ends[window]) - first, key) + first
        units = plan.unit_ends[:, bucket].searchsorted(placed, side="right")
        own = plan.units[units]
        within = placed - (plan.unit_ends[units, bucket] - self._counts[own, bucket])
        return self._members[self._firsts[own, bucket] + within].astype(np.int64)

    def _planned(self, epoch: int, cut: Cut) -> _Epoch:
        if self._plan is None or self._plan[:2] != (epoch, cut):
            self._plan = epoch, cut, self._make_plan(epoch, cut)
        return self._plan[2]

    def _make_plan(self, epoch: int, cut: Cut) -> _Epoch:
        num_units, num_buckets = self._counts.shape
        units = np.arange(num_units)
        if self._windowed:
            units = permute(units, num_units, derive_key(self._seed, epoch, SHARDS))
        unit_ends = np.cumsum(self._counts[units], axis=0)
        lasts = np.minimum(np.arange(self._window, num_units + self._window, self._window), num_units) - 1
        window_ends = unit_ends[lasts]

        starts = np.array(cut.starts, np.int64)
        num_full, left = np.divmod(self.totals - starts, cut.batch_size)
        counts = num_full + (left > 0)
        labels = np.repeat(np.arange(num_buckets), counts)
        chunks = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
        stops = np.minimum(starts[labels] + (chunks + 1) * cut.batch_size, self.totals[labels])
        sizes = stops - starts[labels] - chunks * cut.batch_size
        windows = np.empty(len(labels), np.int64)
        for bucket in range(num_buckets):
            own = labels == bucket
            windows[own] = window_ends[:, bucket].searchsorted(stops[own] - 1, side="right")
        windows[sizes < cut.batch_size] = len(lasts)  # the smaller ones come last
        ranks = np.arange(len(labels))
        if self._shuffle:
            ranks = permute(ranks, len(labels), derive_key(self._seed, epoch, BATCHES, sum(cut.starts)))
        order = np.lexsort((ranks, windows))
        labels, sizes = labels[order], sizes[order]
        for bucket in range(num_buckets):  # the batches of a bucket follow its sequence
            chunks[labels == bucket] = np.arange(counts[bucket])
        ends = np.cumsum(sizes) + starts.sum()
        small = np.uint16
        return _Epoch(
            units,
            unit_ends,
            window_ends,
            labels.astype(small),
            chunks.astype(np.uint32),
            sizes.astype(np.uint32),
            ends,
        )


def check_bucket_state(state: Any, position: int) -> None:
    """Checks the part `buckets` of a loader's state, which may have been damaged, or written by hand.

    Raises:
        ValueError: a field is missing, or of another type or range.
    """
    wrong = f"loader state has buckets {state!r}"
    if not isinstance(state, Mapping) or not {"ratios", "batch_size", "starts"} <= set(state):
        raise ValueError(f"{wrong}, which must be a mapping with ratios, batch_size and starts")
    ratios, starts = state["ratios"], state["starts"]
    pairs = isinstance(ratios, Sequence) and all(_are_counts(pair, 1) and len(pair) == 2 for pair in ratios)
    if not pairs or not _are_counts([state["batch_size"]], 1) or not _are_counts(starts, 0):
        raise ValueError(f"{wrong}, whose numbers must be positive integers, and those of starts 0 or more")
    if len(starts) != len(ratios) or sum(starts) > position:
        raise ValueError(f"{wrong}, which must have a start for each ratio, of {position} samples in all at most")


def _are_counts(values: Any, least: int) -> bool:
    return isinstance(values, Sequence) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= least for value in values
    )
