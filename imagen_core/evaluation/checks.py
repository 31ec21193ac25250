"""Checks of features that all metrics share."""

import numpy as np


def check_rows(name: str, values: np.ndarray, min_rows: int = 1) -> None:
    """Refuses anything but an (n, d) array of finite numbers.

    Raises:
        ValueError: with the shape, or the first row that is not finite.
    """
    if values.ndim != 2 or values.shape[1] == 0 or len(values) < min_rows:
        raise ValueError(f"{name}: must be (n, d) with n at least {min_rows} (got {values.shape})")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(f"{name}: {len(bad)} rows are not finite, the first is row {bad[0]}; leave them out")


def check_pair(a: np.ndarray, b: np.ndarray) -> None:
    """Refuses two sets of features of different widths, which cannot be from one model.

    Raises:
        ValueError: with both widths.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape[1]} and of {b.shape[1]} dimensions; take both from one model")
