"""The kernel distance against a sum over pairs written out."""

import itertools

import numpy as np
import pytest

from imagen_core.evaluation import kernel_distance
from imagen_core.evaluation.kernel import squared_discrepancy


def rows(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 5)) + shift


def pair_by_pair(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    within = [np.mean([k(x, y) for x, y in itertools.permutations(s, 2)]) for s in (a, b)]
    return float(sum(within) - 2 * np.mean([k(x, y) for x in a for y in b]))


def test_one_subset_of_all_rows_is_the_sum_over_pairs() -> None:
    a, b = rows(1, 9), rows(2, 11, 0.5)
    assert squared_discrepancy(a, b) == pytest.approx(pair_by_pair(a, b), rel=1e-12)
    whole = kernel_distance(a, b[:9], num_subsets=4, subset_size=1000)
    assert whole.mean == pytest.approx(pair_by_pair(a, b[:9]), rel=1e-12)
    assert (whole.std, whole.num_subsets, whole.subset_size) == (None, 1, 9)  # all subsets are the same


def test_two_samples_of_one_distribution_have_distance_0_within_the_error_and_others_have_not() -> None:
    same = kernel_distance(rows(1, 2000), rows(2, 2000), num_subsets=60, subset_size=200)
    far = kernel_distance(rows(1, 2000), rows(2, 2000, 0.5), num_subsets=60, subset_size=200)
    assert abs(same.mean) < 0.5 * same.std
    assert far.mean > 5 * far.std


def test_the_mean_does_not_depend_on_the_number_of_samples() -> None:
    """Unlike the Frechet distance's: of these subsets, a tenth as large, the mean is the same within its error."""
    large = kernel_distance(rows(1, 4000), rows(2, 4000, 0.3), num_subsets=20, subset_size=500)
    small = kernel_distance(rows(1, 4000), rows(2, 4000, 0.3), num_subsets=200, subset_size=50)
    assert small.mean == pytest.approx(large.mean, abs=4 * small.std / 200**0.5)


def test_the_seed_decides_the_subsets() -> None:
    a, b = rows(1, 300), rows(2, 300)
    settings = {"num_subsets": 5, "subset_size": 50}
    first = kernel_distance(a, b, **settings, seed=3)
    assert kernel_distance(a, b, **settings, seed=3) == first
    assert kernel_distance(a, b, **settings, seed=4) != first


def test_the_kernel_distance_refuses_features_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="features of 5 and of 4 dimensions"):
        kernel_distance(rows(1, 9), rows(2, 9)[:, :4])
    with pytest.raises(ValueError, match="n at least 2"):
        kernel_distance(rows(1, 9), rows(2, 1))
    with pytest.raises(ValueError, match="subset_size must be 2 or more"):
        kernel_distance(rows(1, 9), rows(2, 9), subset_size=1)
