"""Kernel distance: the squared maximum mean discrepancy of two sets of features.

Binkowski et al. 2018, arXiv 1801.01401.

With the features of the Inception network it is known as KID. Unlike the Frechet distance it has no bias, whatever the
number of samples.
"""

from dataclasses import dataclass

import numpy as np

from imagen_core.evaluation.checks import check_pair, check_rows


@dataclass(frozen=True, slots=True)
class KernelDistance:
    """Mean and standard deviation of the distance over subsets."""

    mean: float
    std: float | None
    """None where both sets have exactly as many rows as a subset, as all subsets are the same."""
    num_subsets: int
    subset_size: int
    """Rows of each subset; fewer than requested if a set has fewer."""


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """The distance of features (n, d) and (m, d), over subsets sampled without replacement.

    Raises:
        ValueError: features of different widths, that are not finite, or fewer than two rows.
    """
    check_rows("features", a, min_rows=2)
    check_rows("features", b, min_rows=2)
    check_pair(a, b)
    size = min(subset_size, len(a), len(b))
    if size < 2 or num_subsets < 1:
        raise ValueError(f"subset_size must be 2 or more, num_subsets 1 or more (got {subset_size}, {num_subsets})")
    if size == len(a) == len(b):
        return KernelDistance(squared_discrepancy(a, b), None, 1, size)
    random = np.random.default_rng(seed)
    values = [
        squared_discrepancy(
            a[random.choice(len(a), size, replace=False)], b[random.choice(len(b), size, replace=False)]
        )
        for _ in range(num_subsets)
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)), num_subsets, size)


def squared_discrepancy(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate with the kernel (x . y / d + 1)^3; it may be below 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return _mean_of_pairs(a) + _mean_of_pairs(b) - 2 * float(_kernel(a, b).mean())


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_of_pairs(rows: np.ndarray) -> float:
    """Mean kernel of two different rows."""
    kernel = _kernel(rows, rows)
    return float((kernel.sum() - np.trace(kernel)) / (len(rows) * (len(rows) - 1)))
