"""The order of samples in an epoch, and the caption each one gets.

Both are pure functions of (seed, epoch, sample), computed where they are needed: no rank holds a list
of all samples, and nothing depends on the numpy version.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

_MASK = (1 << 64) - 1
_NUM_ROUNDS = 6
_MOST_VALUES_PER_POSITION = 4  # so many has the network where all positions are asked for
_AHEAD = 4096  # positions
ORDER, CAPTION, SHARDS, WINDOW, BATCHES, REPLACEMENT = range(6)  # what a key is for


def mix64(x: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014): hashes uint64 to uint64, one to one."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1024)  # an epoch needs the same few for every batch
def derive_key(*parts: int) -> int:
    """One 64-bit key out of several integers; the order of the parts matters."""
    key = 0
    for part in parts:
        x = (key + 0x9E3779B97F4A7C15 + part) & _MASK
        key = int(mix64(np.array([x], dtype=np.uint64))[0])
    return key


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of range(size) sends each position.

    A balanced Feistel network (Luby and Rackoff 1988) over the next power of 4, walked until the value
    is below `size` (Black and Rogaway 2002, cycle walking). Each position is computed on its own; of many at once the
    network is computed once for each value that it can have.

    Args:
        positions: integers in [0, size).
    Returns:
        int64 of the same shape, in [0, size).
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(derive_key(key, i)) for i in range(_NUM_ROUNDS)]

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        return (left << half) | right

    num_values = 1 << 2 * int(half)
    step = network
    if num_values <= _MOST_VALUES_PER_POSITION * positions.size:
        step = network(np.arange(num_values, dtype=np.uint64)).__getitem__
    out = step(positions.astype(np.uint64))
    todo = np.flatnonzero(out >= size)
    while todo.size:
        out[todo] = step(out[todo])
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def resample(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed random function into range(size) sends each position: independent and uniform, so that some values
    come more than once and others not at all.

    Args:
        positions: integers from 0.
    Returns:
        int64 of the same shape, in [0, size).
    """
    hashed = mix64(mix64(positions.astype(np.uint64)) ^ np.uint64(derive_key(key, REPLACEMENT)))
    return (hashed % np.uint64(size)).astype(np.int64)


Place = Callable[[np.ndarray, int, int], np.ndarray]
"""`permute`, or `resample`."""


def choices(indices: np.ndarray, key: int) -> list[int]:
    """A hash of the key and each sample's index; `hash % count` chooses one of `count`."""
    return mix64(mix64(indices.astype(np.uint64)) ^ np.uint64(key)).tolist()


class Ahead:
    """The samples at the next places of a sequence of each epoch, as thousands at once cost little more than a few."""

    def __init__(self, size: int, compute: Callable[[int, np.ndarray], np.ndarray]) -> None:
        """`compute` gives the samples, int64, at rising places below `size` of an epoch."""
        self._size, self._compute = size, compute
        self._epoch, self._first, self._samples = -1, 0, np.empty(0, np.int64)

    def samples(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The sample at each of some rising places of an epoch, int64."""
        if not len(places):
            return places.astype(np.int64)
        first, last = int(places[0]), int(places[-1])
        if epoch != self._epoch or first < self._first or last >= self._first + len(self._samples):
            stop = min(self._size, max(last + 1, first + _AHEAD))
            self._samples = self._compute(epoch, np.arange(first, stop))
            self._epoch, self._first = epoch, first
        return self._samples[places - self._first]


class ShuffledOrder:
    """All samples shuffled with each other by `place`: a function of (seed, epoch)."""

    def __init__(self, size: int, seed: int, place: Place = permute) -> None:
        self._size, self._seed, self._place = size, seed, place
        self._ahead = Ahead(size, self._samples)

    def indices(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The sample at each of some rising positions of an epoch, int64."""
        return self._ahead.samples(epoch, positions)

    def _samples(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        return self._place(positions, self._size, derive_key(self._seed, epoch, ORDER))


class WindowedOrder:
    """An order that reads few shards at a time: shards in random order, samples shuffled within `window` of them.

    An order is a function of (seed, epoch), as `permute` is: each position is computed on its own.
    """

    def __init__(self, bounds: np.ndarray, window: int, seed: int, place: Place = permute) -> None:
        """`bounds`: rising, (n + 1,); shard i has the indices from bounds[i] to bounds[i + 1]. `place`: how samples
        are taken within a window."""
        self._place = place
        self._starts, self._counts = bounds[:-1], np.diff(bounds)
        self._window, self._seed = window, seed
        self._epoch = -1
        self._ahead = Ahead(int(bounds[-1] - bounds[0]), self._samples)

    def indices(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The sample at each of some rising positions of an epoch, int64."""
        return self._ahead.samples(epoch, positions)

    def _samples(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        if epoch != self._epoch:
            self._shuffle_shards(epoch)
        placed = positions.astype(np.int64)
        windows = self._window_ends.searchsorted(positions, side="right")
        for window in np.unique(windows).tolist():
            chosen = windows == window
            first = int(self._window_ends[window - 1]) if window else 0
            size = int(self._window_ends[window]) - first
            key = derive_key(self._seed, epoch, WINDOW, window)
            placed[chosen] = self._place(positions[chosen] - first, size, key) + first
        shards = self._ends.searchsorted(placed, side="right")
        return placed + self._shifts[shards]

    def _shuffle_shards(self, epoch: int) -> None:
        num_shards = len(self._counts)
        order = permute(np.arange(num_shards), num_shards, derive_key(self._seed, epoch, SHARDS))
        self._ends = np.cumsum(self._counts[order])
        self._shifts = self._starts[order] - (self._ends - self._counts[order])
        lasts = np.minimum(np.arange(self._window, num_shards + self._window, self._window), num_shards) - 1
        self._window_ends = self._ends[lasts]
        self._epoch = epoch
