"""Noise schedules against their formulas."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from imagen_core.diffusion import NoiseSchedule
from imagen_core.diffusion.schedules import Discrete, Flow, LogNormal, LogSnrCosine, LogSnrLinear, sampling_range

BETAS = ["linear", "cosine", "quadratic", "jsd", "sigmoid"]
SCHEDULES = [LogSnrLinear(), LogSnrCosine(), LogNormal(), Flow(), *(Discrete(beta=beta) for beta in BETAS)]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)


def log_snr(sigma):
    return float(-2 * sigma.log())


def exact(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_log_snr_linear_is_its_formula_from_end_to_end():
    ends = LogSnrLinear().sigma(exact(0.0, 0.5, 1.0))
    for sigma, time in zip(ends, (0.0, 0.5, 1.0), strict=True):
        assert log_snr(sigma) == pytest.approx(-math.log(math.expm1(1e-4 + 10 * time**2)), rel=1e-9)
    assert log_snr(ends[0]) == pytest.approx(9.21, abs=0.01)
    assert log_snr(ends[2]) == pytest.approx(-10.0, abs=0.01)


def test_log_snr_cosine_is_that_of_the_cosine_alpha_bar():
    for time in (0.0, 0.1, 0.5, 0.9, 0.99):
        kept = math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        assert log_snr(LogSnrCosine().sigma(exact(time))[0]) == pytest.approx(math.log(kept / (1 - kept)), abs=0.01)
    assert log_snr(LogSnrCosine().sigma(exact(1.0))[0]) == pytest.approx(-20, abs=1e-6)


@every_schedule
def test_time_undoes_sigma(schedule):
    if isinstance(schedule, Discrete):
        times = torch.arange(schedule.num_steps, dtype=torch.float64) / (schedule.num_steps - 1)
    else:
        times = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.sigma(times)), times, rtol=1e-6, atol=1e-6)


@every_schedule
def test_sigma_rises_stays_finite_and_is_float64(schedule):
    sigma = schedule.sigma(torch.linspace(0, 1, 2001))
    assert sigma.dtype == torch.float64
    assert bool(sigma.isfinite().all())
    assert bool((sigma > 0).all())
    assert bool((sigma.diff() >= 0).all())
    low, high = sampling_range(schedule)
    assert 0 < low < 0.1 < high


@every_schedule
def test_c_noise_is_finite_and_monotonic(schedule):
    low, high = sampling_range(schedule)
    levels = torch.logspace(math.log10(low), math.log10(high), 300, dtype=torch.float64)
    c_noise = schedule.c_noise(levels)
    steps = c_noise.diff()
    assert bool(c_noise.isfinite().all())
    assert bool((steps > 0).all()) or bool((steps < 0).all())


def test_rescaled_steps_are_as_if_of_1000():
    schedule = Discrete(num_steps=4000, rescale_steps=True)
    expected = torch.arange(4000, dtype=torch.float64) / 4
    torch.testing.assert_close(schedule.c_noise(schedule.sigmas()), expected)
    torch.testing.assert_close(schedule.sigmas(), Discrete(num_steps=4000).sigmas())
    assert "rescale_steps" not in Discrete().model_dump(), "records of earlier versions agree"


def test_c_noise_of_each_schedule():
    sigma = exact(0.3, 2.0)
    torch.testing.assert_close(LogSnrLinear().c_noise(sigma), -2 * sigma.log())
    torch.testing.assert_close(LogSnrCosine().c_noise(sigma), -2 * sigma.log())
    torch.testing.assert_close(LogNormal().c_noise(sigma), sigma.log() / 4)
    table = Discrete().sigmas()
    torch.testing.assert_close(Discrete().c_noise(table), torch.arange(1000, dtype=torch.float64))
    between = (table[10] * table[11]).sqrt()
    assert float(Discrete().c_noise(between[None])[0]) == pytest.approx(10.5)


def test_log_normal_samples_a_normal_logarithm():
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logs = LogNormal(mean=-1.2, std=1.2).sigma(uniform).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=1e-3)
    assert float(logs.std()) == pytest.approx(1.2, abs=1e-3)
    within_one_std = ((logs + 1.2).abs() < 1.2).double().mean()
    assert float(within_one_std) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=1e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_a_uniform_time_selects_every_discrete_step_equally_often(beta):
    schedule = Discrete(num_steps=50, beta=beta)
    uniform = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    steps = schedule.step(schedule.sigma(uniform)).round().long()
    assert torch.bincount(steps, minlength=50).tolist() == [1000] * 50


def formula(beta: str, count: int) -> list[float]:
    """Betas in plain Python."""
    low, high = 1e-4 * 1000 / count, 0.02 * 1000 / count
    part = [k / (count - 1) for k in range(count)]
    if beta == "linear":
        return [low + (high - low) * p for p in part]
    if beta == "quadratic":
        return [(math.sqrt(low) + (math.sqrt(high) - math.sqrt(low)) * p) ** 2 for p in part]
    if beta == "sigmoid":
        return [low + (high - low) / (1 + math.exp(6 - 12 * p)) for p in part]
    if beta == "jsd":
        return [min(0.999, 1 / (count - k)) for k in range(count)]
    level = [math.cos((k / count + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(count + 1)]
    return [min(0.999, 1 - after / before) for before, after in pairwise(level)]


@pytest.mark.parametrize("count", [25, 250, 1000])
@pytest.mark.parametrize("beta", BETAS)
def test_discrete_tables_are_those_of_the_formulas(beta, count):
    kept, sigmas = 1.0, []
    for value in formula(beta, count):
        kept *= 1 - value
        sigmas.append(math.sqrt((1 - kept) / kept))
    torch.testing.assert_close(Discrete(num_steps=count, beta=beta).sigmas(), exact(*sigmas), rtol=1e-8, atol=0)


def test_linear_betas_scaled_by_the_number_of_steps_end_at_the_same_noise():
    """MinImagen's and DALLE2-pytorch's rule: 1000 / T times 1e-4 to 0.02."""
    ends = [float(Discrete(num_steps=count).sigmas()[-1].log()) for count in (250, 1000, 4000)]
    assert ends == pytest.approx([ends[1]] * 3, abs=0.15)  # in ln sigma


@pytest.mark.parametrize("beta", BETAS)
def test_few_steps_give_finite_tables_or_a_clear_error_and_never_nan(beta):
    """One published system trains on NaN without a word: its betas pass 1 below 20 steps."""
    lowest = {"linear": 21, "quadratic": 21, "sigmoid": 20, "cosine": 2, "jsd": 2}[beta]
    for count in range(2, lowest):
        with pytest.raises(ValidationError, match=f"beta={beta} with num_steps={count} has a beta of"):
            Discrete(num_steps=count, beta=beta)
    for count in range(lowest, 40):
        sigmas = Discrete(num_steps=count, beta=beta).sigmas()
        assert bool(sigmas.isfinite().all())
        assert bool((sigmas.diff() > 0).all())


@pytest.mark.parametrize("beta", ["linear", "quadratic"])
def test_20_steps_are_too_few_for_betas_that_end_at_20_over_t(beta):
    with pytest.raises(ValidationError, match="has a beta of 1, which must be below 1; use more steps"):
        Discrete(num_steps=20, beta=beta)


@every_schedule
def test_configs_are_read_by_kind(schedule):
    assert TypeAdapter(NoiseSchedule).validate_python(schedule.model_dump()) == schedule
