"""Power-function averages of the weights, and the rebuilding of one from others (Karras et al. 2024, arXiv 2312.02696,
section 3 and appendix C).

After T updates the average of exponent g weights the weights after update t by t^g, relatively: its profile over
tau in (0, T] is (g + 1) tau^g / T^(g + 1). So its length grows with the training: its standard deviation is a fixed
part of T, `sigma_rel`, by which it is named. An average of any other length, at any update, is about a linear
combination of kept ones, whose coefficients follow from the profiles alone.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

LONGEST = 0.28
"""Largest sigma_rel; the mean of all weights so far has 1 / sqrt(12) = 0.2887."""

POWER = "power-"
"""Beginning of the names of these averages, as files and as weights."""

Profile = tuple[float, float]
"""Number of updates so far, and sigma_rel."""


def power_name(sigma_rel: float) -> str:
    """Name of an average's file and weights."""
    return f"{POWER}{sigma_rel}"


def relative_std(exponent: float) -> float:
    """sigma_rel of an exponent: the standard deviation of its profile as a part of the updates so far."""
    return math.sqrt((exponent + 1) / (exponent + 2) ** 2 / (exponent + 3))


@lru_cache(maxsize=1024)
def exponent_of(sigma_rel: float) -> float:
    """The exponent whose profile has this standard deviation: the real root above 0 of a cubic equation.

    Raises:
        ValueError: sigma_rel is not in (0, LONGEST].
    """
    if not 0 < sigma_rel <= LONGEST:
        raise ValueError(f"sigma_rel must be above 0 and at most {LONGEST} (got {sigma_rel:g})")
    square = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - square, 12.0 - square]).real.max())


def power_decay(exponent: float, update: int) -> float:
    """Weight of the average so far at update 0, 1, 2 ...: exact for weights that are constant between updates."""
    return (update / (update + 1)) ** (exponent + 1)


def inner_product(a: Profile, b: Profile) -> float:
    """Integral of the product of two profiles."""
    (early, first), (late, second) = sorted(((updates, exponent_of(sigma_rel)) for updates, sigma_rel in (a, b)))
    return (first + 1) * (second + 1) / (first + second + 1) * (early / late) ** second / late


def coefficients(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The combination of kept averages whose profile is nearest to the wanted one (least squares).

    Returns:
        float64, one coefficient for each; and the part of the wanted profile that is left over, in the L2 norm: 0 is
        an exact match.
    """
    scales = np.array([inner_product(each, each) ** 0.5 for each in kept])  # unit profiles are better conditioned
    among = np.array([[inner_product(a, b) for b in kept] for a in kept]) / np.outer(scales, scales)
    norm = inner_product(wanted, wanted)
    found, *_ = np.linalg.lstsq(among, np.array([inner_product(a, wanted) for a in kept]) / scales, rcond=1e-12)
    left = norm - 2 * found @ (np.array([inner_product(a, wanted) for a in kept]) / scales) + found @ among @ found
    return found / scales, math.sqrt(max(0.0, float(left)) / norm)
