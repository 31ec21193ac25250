"""Mean and covariance of a stream of features, in float64."""

import numpy as np

from imagen_core.evaluation.checks import check_rows

_ROWS_AT_ONCE = 1024


class Moments:
    """Mean and covariance of the rows added so far, in the memory of one d x d matrix, whatever their number.

    Sums of squares are kept about the mean (Chan, Golub and LeVeque 1983), so that nothing cancels.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of (n, d) features, of any float type; may be a memory map."""
        moments = cls(features.shape[1])
        moments.add(features)
        return moments

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """float64 (d, d), unbiased: the sum of squares over n - 1.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"features: a covariance needs 2 rows or more (got {self.count})")
        return self._scatter / (self.count - 1)

    def add(self, features: np.ndarray) -> None:
        """Adds rows (n, d).

        Raises:
            ValueError: another width, or rows that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features: must be (n, {self.dim}) (got {features.shape})")
        for start in range(0, len(features), _ROWS_AT_ONCE):
            rows = np.asarray(features[start : start + _ROWS_AT_ONCE], np.float64)
            check_rows("features", rows)
            mean = rows.mean(axis=0)
            self._merge(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merge(self, other: "Moments") -> None:
        """Adds the rows that were added to `other`."""
        self._merge(other.count, other.mean, other._scatter)

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        if total:
            shift = mean - self.mean
            self._scatter += scatter + np.outer(shift, shift) * (self.count * count / total)
            self.mean = self.mean + shift * (count / total)
            self.count = total
