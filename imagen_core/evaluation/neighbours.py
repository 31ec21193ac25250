"""Precision and recall by nearest neighbours (Kynkaanniemi et al. 2019, arXiv 1904.06991)."""

from dataclasses import dataclass

import numpy as np

from imagen_core.evaluation.checks import check_pair, check_rows

_ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class PrecisionRecall:
    """Fractions in [0, 1]."""

    precision: float
    """Fraction of the generated images that lie among the real ones."""
    recall: float
    """Fraction of the real images that lie among the generated ones."""


def precision_recall(generated: np.ndarray, real: np.ndarray, *, num_neighbours: int = 3) -> PrecisionRecall:
    """From features (n, d) and (m, d). A row lies among a set if it is no farther from one of its rows than that row's
    `num_neighbours`-th neighbour in the set is. The time grows with (n + m)^2.

    Raises:
        ValueError: features of different widths, that are not finite, or not more rows than neighbours.
    """
    for features in (generated, real):
        check_rows("features", features, min_rows=num_neighbours + 1)
    check_pair(generated, real)
    generated, real = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    return PrecisionRecall(
        _fraction_among(generated, real, _squared_radii(real, num_neighbours)),
        _fraction_among(real, generated, _squared_radii(generated, num_neighbours)),
    )


def _squared_radii(rows: np.ndarray, num_neighbours: int) -> np.ndarray:
    """Squared distance of each row to its k-th neighbour; the row itself is the 0th."""
    blocks = (_squared_distances(rows[start : start + _ROWS_AT_ONCE], rows) for start in _starts(rows))
    return np.concatenate([np.partition(block, num_neighbours, axis=1)[:, num_neighbours] for block in blocks])


def _fraction_among(rows: np.ndarray, others: np.ndarray, squared_radii: np.ndarray) -> float:
    blocks = (_squared_distances(rows[start : start + _ROWS_AT_ONCE], others) for start in _starts(rows))
    return float(np.concatenate([(block <= squared_radii).any(axis=1) for block in blocks]).mean())


def _starts(rows: np.ndarray) -> range:
    return range(0, len(rows), _ROWS_AT_ONCE)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T).clip(min=0)
