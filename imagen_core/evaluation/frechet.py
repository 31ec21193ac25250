"""Frechet distance of two sets of features, as Gaussians (Heusel et al. 2017, arXiv 1706.08500, equation 6).

With the features of the Inception network it is known as FID; with other features it is not, and distances of
different features cannot be compared.
"""

from dataclasses import dataclass

import numpy as np

from imagen_core.evaluation.moments import Moments


@dataclass(frozen=True, slots=True)
class FrechetDistance:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), and how far to trust it."""

    distance: float
    mean_term: float
    """|m1 - m2|^2; the rest comes from the covariances."""
    warning: str | None
    """Why the number is biased: too few samples; None if there are enough."""


def frechet_distance(a: Moments, b: Moments) -> FrechetDistance:
    """The squared Frechet distance of two Gaussians, exact in float64.

    (S1 S2)^(1/2) has the trace of the singular values of S1^(1/2) S2^(1/2), whose factors are symmetric roots.

    Raises:
        ValueError: features of different widths, or fewer than two rows.
    """
    if a.dim != b.dim:
        raise ValueError(f"features of {a.dim} and of {b.dim} dimensions; take both from one model")
    mean_term = float(np.square(a.mean - b.mean).sum())
    traces = float(np.trace(a.covariance) + np.trace(b.covariance))
    overlap = float(np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum())
    return FrechetDistance(mean_term + traces - 2 * overlap, mean_term, _warning(min(a.count, b.count), a.dim))


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semidefinite matrix; eigenvalues below 0 are rounding."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _warning(count: int, dim: int) -> str | None:
    if count > dim:
        return None
    return (
        f"{count} samples for {dim} dimensions: the covariance is singular and the distance too large; "
        f"take more than {dim}, and compare only distances of equally many"
    )
