"""Near hashes among many: the same pairs as by comparing all with all."""

import numpy as np
import pytest

from stages.duplicates import search
from stages.duplicates.search import near


def found(queries: np.ndarray, hashes: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    return sorted(
        pair for parts in near(queries, hashes, most) for pair in zip(*(p.tolist() for p in parts), strict=True)
    )


def changed(hashes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The hashes with 0 to 9 other bits."""
    result = hashes.copy()
    for place in range(len(result)):
        for bit in random.choice(64, random.integers(0, 10), replace=False):
            result[place] ^= np.uint64(1) << np.uint64(bit)
    return result


@pytest.mark.parametrize(("most", "few"), [(0, 0), (3, 1024), (5, 0), (5, 1024)])
def test_all_pairs_of_near_hashes_are_found_and_each_once(
    most: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_FEW", few)
    random = np.random.default_rng(most)
    hashes = random.integers(0, 2**64, 300, dtype=np.uint64)
    queries = changed(hashes, random)
    bits = np.bitwise_count(queries[:, None] ^ hashes[None])
    expected = [(int(a), int(b), int(bits[a, b])) for a, b in zip(*np.nonzero(bits <= most), strict=True)]
    assert len(expected) > 20
    assert found(queries, hashes, most) == expected


def test_a_bucket_with_more_pairs_than_are_compared_at_once_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_PAIRS_AT_ONCE", 7)
    monkeypatch.setattr(search, "_FEW", 0)
    hashes = np.arange(40, dtype=np.uint64) << np.uint64(50)  # the first two thirds of all are the same
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])
    assert len(found(hashes, hashes, 5)) == int((bits <= 5).sum())
