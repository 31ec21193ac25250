"""The Frechet distance against closed forms and against scipy's matrix root."""

from pathlib import Path

import numpy as np
import pytest

from imagen_core.evaluation import Moments, frechet_distance


def gaussian(mean: float, deviation: float, dim: int = 4, count: int = 50) -> np.ndarray:
    """Rows whose sample mean and covariance are exactly mean * 1 and deviation^2 * I."""
    rows = np.random.default_rng(0).standard_normal((count, dim))
    rows -= rows.mean(axis=0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return mean + deviation * rows


def correlated(seed: int, count: int, dim: int = 12) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal((count, dim)) @ random.standard_normal((dim, dim)) + random.standard_normal(dim)


def test_two_round_gaussians_have_the_distance_of_their_means_and_deviations() -> None:
    found = frechet_distance(Moments.of(gaussian(1, 2)), Moments.of(gaussian(-0.5, 3)))
    assert found.mean_term == pytest.approx(4 * 1.5**2, rel=1e-12)
    assert found.distance == pytest.approx(4 * 1.5**2 + 4 * (2 - 3) ** 2, rel=1e-10)
    assert found.warning is None


def test_a_set_has_distance_0_to_itself_also_with_fewer_samples_than_dimensions() -> None:
    for count in (500, 8):
        moments = Moments.of(100 * correlated(1, count))
        assert abs(frechet_distance(moments, moments).distance) < 1e-9 * np.trace(moments.covariance)


def test_the_frechet_distance_is_what_scipys_matrix_root_gives() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = correlated(1, 200), correlated(2, 300)
    root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    shift = a.mean(axis=0) - b.mean(axis=0)
    expected = shift @ shift + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root.real)
    found = frechet_distance(Moments.of(a), Moments.of(b))
    assert found.distance == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(Moments.of(b), Moments.of(a)).distance == pytest.approx(found.distance, rel=1e-12)


def test_too_few_samples_are_a_warning_in_the_result() -> None:
    few = frechet_distance(Moments.of(correlated(1, 12)), Moments.of(correlated(2, 300)))
    assert few.warning is not None
    assert "12 samples for 12 dimensions" in few.warning
    assert frechet_distance(Moments.of(correlated(1, 13)), Moments.of(correlated(2, 300))).warning is None


def test_moments_do_not_depend_on_order_batches_or_merging() -> None:
    rows = correlated(3, 2500).astype(np.float32) + 1000
    exact = rows.astype(np.float64)
    orders = np.random.default_rng(0).permutation(len(rows))
    parts = Moments(12)
    for part in np.array_split(rows[orders], 7):
        parts.merge(Moments.of(part))
    for moments in (Moments.of(rows), Moments.of(rows[orders]), parts):
        assert moments.count == 2500
        np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(moments.covariance, np.cov(exact, rowvar=False), rtol=1e-10, atol=1e-9)


def test_features_in_a_memory_map_are_read_in_parts(tmp_path: Path) -> None:
    rows = correlated(3, 3000).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    np.testing.assert_allclose(Moments.of(mapped).mean, rows.astype(np.float64).mean(axis=0), rtol=1e-12)


def test_wrong_features_are_named() -> None:
    rows = correlated(1, 20)
    with pytest.raises(ValueError, match="features of 12 and of 4 dimensions"):
        frechet_distance(Moments.of(rows), Moments.of(rows[:, :4]))
    with pytest.raises(ValueError, match=r"must be \(n, 12\) \(got \(20, 4\)\)"):
        Moments(12).add(rows[:, :4])
    with pytest.raises(ValueError, match="needs 2 rows or more"):
        frechet_distance(Moments.of(rows), Moments.of(rows[:1]))
    rows[7, 3] = np.nan
    with pytest.raises(ValueError, match="1 rows are not finite, the first is row 7"):
        Moments.of(rows)
