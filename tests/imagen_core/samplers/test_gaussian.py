"""Every sampler reaches a Gaussian exactly, at the speed its order promises."""

import math
from itertools import pairwise

import pytest
import torch

from imagen_core.diffusion.schedules import Discrete, LogNormal, LogSnrCosine, LogSnrLinear
from imagen_core.diffusion.steps import Karras, Uniform
from imagen_core.samplers import Ancestral, Ddim, DpmSolverPP2M, Euler, Heun, History, Plms, Prk, sample
from tests.imagen_core.samplers.gaussian import Gaussian, law

SAMPLERS = {
    "ancestral": (Ancestral(), 1400),
    "ddim_0": (Ddim(), 700),
    "ddim_0.5": (Ddim(eta=0.5), 900),
    "ddim_1": (Ddim(eta=1.0), 1400),
    "euler": (Euler(), 700),
    "euler_churn": (Euler(churn=0.005), 1000),
    "heun": (Heun(), 80),
    "heun_churn": (Heun(churn=0.1), 250),
    "heun_churn_range": (Heun(churn=0.1, churn_sigma_min=0.05, churn_sigma_max=50), 250),
    "dpmpp_2m": (DpmSolverPP2M(), 80),
    "plms": (Plms(), 60),
    "prk": (Prk(), 20),
    "prk_then_plms": (Prk(num_steps=3), 60),
}


def relative_errors(sampler, sigmas, data):
    mean, covariance = law(sampler, data.denoise, sigmas)
    return abs(float(mean) / data.mean - 1), abs(float(covariance) / data.std**2 - 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_gaussian_is_reached_in_mean_and_variance(name):
    sampler, num_steps = SAMPLERS[name]
    mean_error, variance_error = relative_errors(sampler, Karras().sigmas(LogNormal(), num_steps), Gaussian())
    assert mean_error < 0.01
    assert variance_error < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [LogSnrLinear(), LogSnrCosine(), Discrete(num_steps=2000)], ids=lambda s: s.kind)
@pytest.mark.parametrize(
    "name",
    ["dpmpp_2m", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ancestral", "ddim_0", "heun", "plms"))],
)
def test_a_gaussian_is_reached_on_the_steps_of_every_schedule(name, schedule):
    sampler, _ = SAMPLERS[name]
    mean_error, variance_error = relative_errors(sampler, Uniform().sigmas(schedule, 2000), Gaussian())
    assert mean_error < 0.01
    assert variance_error < 0.01


def test_sampled_images_have_the_mean_and_variance_of_the_exact_law():
    data, sigmas = Gaussian(), Karras().sigmas(LogNormal(), 8)

    class OneGenerator:
        def __init__(self, count):
            self._generator = torch.Generator().manual_seed(0)
            self._count = count

        def __len__(self):
            return self._count

        def normal(self, shape, device, dtype):
            return torch.randn(self._count, *shape, generator=self._generator, dtype=dtype)

    for sampler in (Ancestral(), Heun(churn=0.3)):
        pixels = sample(sampler, data.denoise, sigmas, OneGenerator(200_000), (1, 1, 1), dtype=torch.float64)
        mean, covariance = law(sampler, data.denoise, sigmas)
        assert float(pixels.mean()) == pytest.approx(float(mean), abs=5 * data.std / math.sqrt(200_000))
        assert float(pixels.var()) == pytest.approx(float(covariance), rel=5 * math.sqrt(2 / 200_000))


def final_error(sampler, num_steps, *, even_sigma=False):
    """Distance to the exact flow after steps even in sigma (3 to 0.5) or in ln sigma (10 to 0.1)."""
    data, start = Gaussian(), torch.tensor(3.0, dtype=torch.float64)
    if even_sigma:
        sigmas = torch.linspace(3.0, 0.5, num_steps + 1, dtype=torch.float64)
    else:
        sigmas = torch.linspace(math.log(10), math.log(0.1), num_steps + 1, dtype=torch.float64).exp()
    x, history = start, History()
    for sigma, sigma_next in pairwise(sigmas):
        x = sampler.step(data.denoise, x, sigma, sigma_next, pytest.fail, history)
    return abs(float(x - data.flow(start, sigmas[0], sigmas[-1])))


@pytest.mark.parametrize(
    ("sampler", "even_sigma", "order"),
    [
        (Ddim(), False, 1),
        (Euler(), False, 1),
        (Heun(), False, 2),
        (DpmSolverPP2M(), False, 2),
        (Plms(), False, 2),
        (Plms(), True, 3),
        (Prk(), False, 4),
        (Prk(), True, 4),
    ],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_the_error_falls_with_the_order_of_the_method(sampler, even_sigma, order):
    few, many = (final_error(sampler, n, even_sigma=even_sigma) for n in (80, 160))
    assert math.log2(few / many) > order - 0.1


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_variance_error_of_stochastic_sampling_is_of_first_order(eta):
    few, many = (
        relative_errors(Ddim(eta=eta), Karras().sigmas(LogNormal(), n), Gaussian(mean=0.5))[1] for n in (100, 200)
    )
    assert math.log2(few / many) == pytest.approx(1, abs=0.2)
