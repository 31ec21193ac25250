"""Shares by quota: exact in every stretch, and computed anywhere without what comes before."""

from fractions import Fraction

import numpy as np
import pytest

from imagen_core.store.read.quota import MOST, Quota, whole_weights

WEIGHTS = [(0.7, 0.3), (1.0, 1.0, 1.0), (0.999, 0.001), (5, 0, 3, 2), (1 / 3, 0.123456789, 0.2), (1e-9, 1)]


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ((0.7, 0.3), [7, 3]),
        ((14, 6), [7, 3]),
        ((1, 1, 1), [1, 1, 1]),
        ((0.1, 0.2, 0.0), [1, 2, 0]),
        ((0.5,), [1]),
        ((1e-12, 1), [1, MOST]),
    ],
)
def test_weights_become_the_smallest_whole_numbers_of_the_same_ratio(
    weights: tuple[float, ...], whole: list[int]
) -> None:
    assert whole_weights(weights) == whole


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.0, 0.0), "not all be 0"),
        ((1, -0.5), r"got -0\.5"),
        ((1, float("nan")), "got nan"),
        ((float("inf"),), "inf"),
    ],
)
def test_weights_without_a_meaning_are_refused(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quota(weights)


def by_hand(weights: list[int], count: int) -> list[int]:
    """The rule in exact fractions, one turn after the other."""
    had = [0] * len(weights)
    turns = []
    for _ in range(count):
        due = [(Fraction(2 * had[m] + 1, 2 * w), m) for m, w in enumerate(weights) if w]
        turns.append(min(due)[1])
        had[turns[-1]] += 1
    return turns


@pytest.mark.parametrize("weights", WEIGHTS)
def test_turns_are_those_of_the_rule_wherever_they_are_computed(weights: tuple[float, ...]) -> None:
    quota = Quota(weights)
    expected = np.array(by_hand(quota.weights.tolist(), 600))
    members, numbers = quota.turns(0, 600)
    np.testing.assert_array_equal(members, expected)
    for member in range(len(weights)):
        own = numbers[members == member]
        np.testing.assert_array_equal(own, np.arange(len(own)))
    for start, stop in ((0, 1), (1, 10), (9, 11), (397, 413), (599, 600), (500, 500)):
        part = quota.turns(start, stop)
        np.testing.assert_array_equal(part, (members[start:stop], numbers[start:stop]))
        np.testing.assert_array_equal(quota.counts(start), np.bincount(members[:start], minlength=len(weights)))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_far_positions_continue_the_counts_before_them(weights: tuple[float, ...]) -> None:
    quota = Quota(weights)
    for start in (10**6 - 7, 10**9 + 1, MOST - 3, 10**12):
        members, numbers = quota.turns(start, start + 500)
        counts = quota.counts(start)
        for member in range(len(weights)):
            own = numbers[members == member]
            np.testing.assert_array_equal(own, counts[member] + np.arange(len(own)))
        np.testing.assert_array_equal(quota.counts(start + 500), counts + np.bincount(members, minlength=len(counts)))
        assert quota.counts(start).sum() == start


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_stretch_of_10_000_has_its_shares_within_one_percent_of_them_or_a_few_turns(
    weights: tuple[float, ...],
) -> None:
    quota = Quota(weights)
    members = quota.turns(0, 60_000)[0]
    shares = quota.weights / quota.weights.sum()
    for member, share in enumerate(shares):
        sums = np.concatenate([[0], np.cumsum(members == member)])
        error = np.abs(sums[10_000:] - sums[:-10_000] - 10_000 * share).max()
        assert error <= 1 + len(weights) * share + 1e-6
        error = np.abs(sums - share * np.arange(len(sums))).max()
        assert error <= (1 + len(weights)) / 2
