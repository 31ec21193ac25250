"""Shares by quota: which of several members takes each position of a sequence, so that every stretch has its share."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

MOST = 1 << 24
"""The weights together are whole numbers of at most about this sum, so less than 1 / MOST of it counts as 1 / MOST."""


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights as the smallest whole numbers in the same ratios: 0.7 and 0.3 are 7 and 3.

    Raises:
        ValueError: one is negative or not finite, or all are 0.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights must be finite and 0 or more (got {weight})")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    if not total:
        raise ValueError(f"weights must not all be 0 (got {list(weights)})")
    common = math.lcm(*(weight.denominator for weight in exact))
    found = [int(weight * common) for weight in exact]
    divisor = math.gcd(*found)
    found = [weight // divisor for weight in found]
    if sum(found) > MOST:
        found = [max(1, round(weight * MOST / total)) if weight else 0 for weight in exact]
        divisor = math.gcd(*found)
        found = [weight // divisor for weight in found]
    return found


class Quota:
    """Members take turns by weight, as seats are given by the rule of Webster and Sainte-Lague (Balinski, Young 1982).

    The k-th turn of a member, from 0, is due at (2 k + 1) / (2 w), w its weight; turns come in the order in which they
    are due, those due together in the order of the members. So at every position the turns that each member has had
    are its share, with an error of at most (1 + number of members) / 2. The sequence is a pure function of the
    weights. What a turn is, a sample or a batch, is the caller's affair.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """
        Raises:
            ValueError: see `whole_weights`.
        """
        self.weights = np.array(whole_weights(weights), np.int64)
        """(members,), whole numbers; after as many positions as their sum each member has had its weight in turns."""
        self._period = int(self.weights.sum())

    def turns(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Whose turn each position from `start` to `stop` is, and how many turns that member had before.

        Returns:
            Two int64 arrays (stop - start,).
        """
        periods, first = divmod(start, self._period)
        members, numbers, before = self._around(first, first + stop - start)
        chosen = slice(before, before + stop - start)
        members = members[chosen]
        return members, numbers[chosen] + periods * self.weights[members]

    def counts(self, position: int) -> np.ndarray:
        """Turns of each member before a position, int64 (members,)."""
        periods, rest = divmod(position, self._period)
        members, _, before = self._around(rest, rest)
        counts = self._certain(rest) + np.bincount(members[:before], minlength=len(self.weights))
        return periods * self.weights + counts

    def _certain(self, position: int) -> np.ndarray:
        """Turns of each member that came before a position for certain."""
        return np.maximum(position * self.weights // self._period - len(self.weights) - 1, 0)

    def _around(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Turns in their order, among them all from `first` to `last`: members, numbers, and how many come before."""
        lows = self._certain(first)
        highs = last * self.weights // self._period + len(self.weights) + 1
        counts = np.where(self.weights > 0, highs - lows, 0)
        members = np.repeat(np.arange(len(counts)), counts)
        numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - lows, counts)
        # Equal quotients round to equal numbers. Others differ by 2 / W^2 or more, W the sum of the weights, which is
        # more than rounding as long as W (last - first) + 2 W^2 < 2^53.
        order = np.argsort((2 * numbers + 1) / (2 * self.weights[members]), kind="stable")
        return members[order], numbers[order], first - int(lows.sum())
