"""Which hashes are near each other, among millions: multi-index hashing in numpy.

Two hashes of 64 bits that differ in at most 5 bits differ in at most one bit of some third. So each third is a table
of some two million buckets, and a hash is compared with what is in its own bucket and in the 21 or 22 that are one bit
away: of a million hashes with some 30, not with a million.
"""

from collections.abc import Iterator

import numpy as np

MAX_DISTANCE = 5
"""The largest number of differing bits for which `near` finds all pairs."""
_THIRDS = ((0, 21), (21, 21), (42, 22))
"""First bit and number of bits."""
_PAIRS_AT_ONCE = 1 << 20
_FEW = 1024  # with so many hashes the tables take longer than to compare all


def near(
    queries: np.ndarray, hashes: np.ndarray, max_distance: int = MAX_DISTANCE
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs of a query and a hash that differ in at most `max_distance` bits, each pair once.

    Args:
        queries, hashes: uint64 (n,) and (m,); equal values are best given once.
        max_distance: 0 to 5.
    Yields:
        Positions in `queries` and `hashes`, int64 (k,), and the number of differing bits, uint8 (k,). Memory is
        bounded: some 50 bytes for each query and hash, and 100 MB.
    """
    assert 0 <= max_distance <= MAX_DISTANCE
    if len(hashes) <= _FEW:
        yield from _all_with_all(queries, hashes, max_distance)
        return
    for third, (_, bits) in enumerate(_THIRDS):
        buckets = _third(hashes, third)
        order = np.argsort(buckets, kind="stable").astype(np.int32)
        ordered = hashes[order]
        starts = np.concatenate([[0], np.cumsum(np.bincount(buckets, minlength=1 << bits))])
        wanted = _third(queries, third)
        for neighbour in (0, *(1 << bit for bit in range(bits))):
            first = starts[wanted ^ neighbour]
            counts = starts[(wanted ^ neighbour) + 1] - first
            for rows in _portions(counts):
                yield from _compare(queries, ordered, order, rows, first, counts, third, max_distance)


def _all_with_all(
    queries: np.ndarray, hashes: np.ndarray, max_distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for low in range(0, len(queries), _FEW):
        distance = np.bitwise_count(queries[low : low + _FEW, None] ^ hashes)
        query, hash = np.nonzero(distance <= max_distance)
        yield query + low, hash, distance[query, hash]


def _compare(
    queries: np.ndarray,
    ordered: np.ndarray,
    order: np.ndarray,
    rows: slice,
    first: np.ndarray,
    counts: np.ndarray,
    third: int,
    max_distance: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Compares some queries with the buckets that begin at `first` and have so many hashes."""
    lengths = counts[rows]
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    for low in range(0, total, _PAIRS_AT_ONCE):  # one bucket may have more
        numbers = np.arange(low, min(low + _PAIRS_AT_ONCE, total))
        query = np.searchsorted(ends, numbers, side="right") if low or total > _PAIRS_AT_ONCE else None
        query = np.repeat(np.arange(len(lengths)), lengths) if query is None else query
        places = numbers - (ends - lengths)[query] + first[rows][query]
        difference = queries[rows][query] ^ ordered[places]
        distance = np.bitwise_count(difference)
        hit = np.flatnonzero(distance <= max_distance)
        hit = hit[_is_first(difference[hit], third)]
        if len(hit):
            yield query[hit] + (rows.start or 0), order[places[hit]].astype(np.int64), distance[hit]


def _is_first(difference: np.ndarray, third: int) -> np.ndarray:
    """Whether no earlier third finds the pair too."""
    found = np.zeros(len(difference), bool)
    for earlier in range(third):
        found |= np.bitwise_count(_third(difference, earlier)) <= 1
    return ~found


def _portions(counts: np.ndarray) -> Iterator[slice]:
    """Slices of the queries with some _PAIRS_AT_ONCE pairs each, or a single query."""
    ends = np.cumsum(counts)
    low = 0
    while low < len(counts):
        done = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        if int(ends[high - 1]) > done:
            yield slice(low, high)
        low = high


def _third(hashes: np.ndarray, third: int) -> np.ndarray:
    first, bits = _THIRDS[third]
    return ((hashes >> np.uint64(first)) & np.uint64((1 << bits) - 1)).astype(np.int64)
