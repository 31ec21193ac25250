"""Power-function averages and their rebuilding, against numeric integration and averages that were tracked."""

import numpy as np
import pytest
import torch
from torch import Tensor

from imagen_core.train.averages.power import (
    coefficients,
    exponent_of,
    inner_product,
    power_decay,
    relative_std,
)
from imagen_core.train.checkpoints.rebuild import rounded


def profile(updates: float, sigma_rel: float, times: np.ndarray) -> np.ndarray:
    """The density at `times`, by its definition: a power of the time, up to `updates`, of integral 1."""
    values = np.where(times <= updates, times ** exponent_of(sigma_rel), 0.0)
    return values / integral(np.where(times <= updates, values, 0.0), times)


def integral(values: np.ndarray, times: np.ndarray) -> float:
    return float(np.sum((values[1:] + values[:-1]) / 2 * np.diff(times)))


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.25])
def test_sigma_rel_is_the_standard_deviation_as_a_part_of_the_training(sigma_rel: float) -> None:
    times = np.linspace(0, 200.0, 400_001)
    density = profile(200.0, sigma_rel, times)
    mean = integral(density * times, times)
    assert integral(density * (times - mean) ** 2, times) ** 0.5 / 200 == pytest.approx(sigma_rel, rel=1e-5)
    assert relative_std(exponent_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


def test_the_papers_two_lengths_have_its_exponents() -> None:
    assert exponent_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent_of(0.10) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, float("nan")])
def test_a_length_without_an_exponent_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"sigma_rel must be above 0 and at most 0.28 \(got "):
        exponent_of(sigma_rel)


@pytest.mark.parametrize(
    ("a", "b"),
    [((100, 0.05), (100, 0.05)), ((40, 0.05), (100, 0.1)), ((100, 0.2), (70, 0.03)), ((100, 0.05), (40, 0.1))],
)
def test_inner_products_are_those_of_numeric_integration(a: tuple[int, float], b: tuple[int, float]) -> None:
    edge = min(a[0], b[0])  # where the product jumps to 0
    times = np.linspace(0, edge, 400_001)
    first, second = (
        (exponent_of(sigma_rel) + 1) / updates * (times / updates) ** exponent_of(sigma_rel)
        for updates, sigma_rel in (a, b)
    )
    assert inner_product(a, b) == pytest.approx(integral(first * second, times), rel=1e-6)
    assert inner_product(a, b) == inner_product(b, a)


def test_an_average_by_updates_is_the_profile_of_weights_that_are_constant_between_them() -> None:
    exponent, values = exponent_of(0.08), torch.randn(30, dtype=torch.float64, generator=seeded())
    average = 0.0
    for update, value in enumerate(values.tolist()):
        kept = power_decay(exponent, update)
        average = kept * average + (1 - kept) * value
    edges = (torch.arange(31, dtype=torch.float64) / 30) ** (exponent + 1)
    assert average == pytest.approx(float((edges.diff() * values).sum()), rel=1e-12)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_an_average_that_is_kept_is_found_alone() -> None:
    kept = [(50, 0.05), (50, 0.1), (100, 0.05), (100, 0.1)]
    found, left = coefficients(kept, (100, 0.05))
    np.testing.assert_allclose(found, [0, 0, 1, 0], atol=1e-7)
    assert left < 1e-6


def test_coefficients_are_the_least_squares_of_the_profiles() -> None:
    kept = [(updates, sigma_rel) for updates in (20, 40, 60, 80, 100) for sigma_rel in (0.05, 0.1)]
    found, left = coefficients(kept, (100, 0.16))
    times = np.linspace(0, 100, 200_001)
    densities = np.stack([profile(*each, times) for each in kept])
    wanted = profile(100, 0.16, times)
    reference, *_ = np.linalg.lstsq(densities.T, wanted, rcond=None)
    np.testing.assert_allclose(found, reference, atol=2e-3)
    error = integral((found @ densities - wanted) ** 2, times) / integral(wanted**2, times)
    assert left == pytest.approx(error**0.5, rel=2e-2)


def tracked(lengths: tuple[float, ...], num_updates: int = 400, every: int = 10) -> dict[tuple[int, float], Tensor]:
    """Averages of a weight on a random walk: of every length after every 10 updates."""
    generator = seeded()
    weight, averages = torch.randn(300, generator=generator), dict.fromkeys(lengths, torch.zeros(300))
    found = {}
    for update in range(num_updates):
        weight = weight + 0.1 * torch.randn(300, generator=generator)
        for length in lengths:
            averages[length] = weight.lerp(averages[length], power_decay(exponent_of(length), update))
        if (update + 1) % every == 0:
            found |= {(update + 1, length): average.clone() for length, average in averages.items()}
    return found


@pytest.mark.parametrize("wanted", [(400, 0.05), (400, 0.06), (400, 0.07), (400, 0.15), (300, 0.08), (400, 0.2)])
def test_a_rebuilt_average_is_the_one_that_was_tracked(wanted: tuple[int, float]) -> None:
    known = tracked(tuple({0.05, 0.1, wanted[1]}))
    kept = [each for each in known if each[1] in (0.05, 0.1) and each[0] <= wanted[0]]
    found, left = coefficients(kept, wanted)
    rebuilt = sum(factor * rounded(known[each]).float() for factor, each in zip(found.tolist(), kept, strict=True))
    assert isinstance(rebuilt, Tensor)
    error = torch.linalg.vector_norm(rebuilt - known[wanted]) / torch.linalg.vector_norm(known[wanted])
    assert float(error) < 1e-3
    assert left < 0.02


def test_tensors_that_float16_does_not_hold_are_kept_in_float32() -> None:
    assert rounded(torch.randn(99, generator=seeded())).dtype == torch.float16
    for large_or_small in (torch.tensor([1.0, 1e6]), torch.tensor([1e-7, 2.3e-7]), torch.tensor([1e-9])):
        assert torch.equal(rounded(large_or_small), large_or_small)
    assert rounded(torch.zeros(3)).dtype == torch.float16
