"""The order of samples in an epoch, and the caption each one gets.

Both are pure functions of (seed, epoch, sample), computed where they are needed: no rank holds a list
of all samples, and nothing depends on the numpy version.
"""

from functools import lru_cache

import numpy as np

_MASK = (1 << 64) - 1
_NUM_ROUNDS = 6


def mix64(x: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014): hash uint64 to uint64, one to one."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)  # an epoch needs the same few for every batch
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
    is below `size` (Black and Rogaway 2002, cycle walking). Any position is computed alone.

    Args:
        positions: integers in [0, size).
    Returns:
        int64 of the same shape, in [0, size).
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(derive_key(key, i)) for i in range(_NUM_ROUNDS)]
    out = positions.astype(np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        x = out[todo]
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def pick(indices: np.ndarray, counts: np.ndarray, key: int) -> np.ndarray:
    """One choice in [0, count) a sample, a hash of the key and the sample's index; int64."""
    hashes = mix64(mix64(indices.astype(np.uint64)) ^ np.uint64(key))
    return (hashes % counts.astype(np.uint64)).astype(np.int64)
