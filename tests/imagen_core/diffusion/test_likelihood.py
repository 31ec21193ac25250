"""Bits a dimension: closed forms, and the bound of a model that is exactly right."""

import math
from itertools import pairwise

import pytest
import torch

from imagen_core.diffusion import bits_per_dimension
from imagen_core.diffusion.likelihood import bound_term, discretised_log_likelihood, prior_term
from imagen_core.diffusion.schedules import Discrete, Flow, LogSnrCosine
from imagen_core.diffusion.steps import Karras, Uniform
from imagen_core.models import Conditioning
from tests.imagen_core.diffusion.small import small_denoiser, stub

STD = 0.3


def images(count: int) -> torch.Tensor:
    """8-bit images with normal pixels, as numbers in [-1, 1]."""
    values = STD * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((values + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def noise_of(count: int):
    def noise_at(step: int) -> torch.Tensor:
        return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(9 + step), dtype=torch.float64)

    return noise_at


def exact_model(num_steps: int = 1000, **diffusion):
    """D is the mean of p(x0 | x) for images with pixels N(0, STD^2); a learned variance is that of p(x_next | x)."""
    settings = {"objective": "x0", "schedule": {"kind": "discrete", "num_steps": num_steps}} | diffusion
    channels = 6 if diffusion.get("variance") == "learned" else 3
    denoiser = small_denoiser(unet={"out_channels": channels}, diffusion=settings)
    schedule = denoiser.config.diffusion.schedule

    def says(x, c_noise, conditioning):
        level = schedule.sigmas()[c_noise.round().long()] if isinstance(schedule, Discrete) else (-c_noise / 2).exp()
        share = (STD**2 / (STD**2 + level**2))[:, None, None, None]
        estimate = share * x * (1 + level**2).sqrt()[:, None, None, None]  # the network sees x / sqrt(1 + sigma^2)
        if channels == 3:
            return estimate
        below = torch.cat([torch.zeros(1), schedule.sigmas()])[c_noise.round().long()]
        kept = 1 - (below / level) ** 2
        variance = below**2 * kept + kept**2 * level**2 * STD**2 / (STD**2 + level**2)
        log_variance = (variance / (1 + below**2)).log()[:, None, None, None]
        return torch.cat([estimate, log_variance.expand_as(x)], dim=1)

    stub(denoiser, says)
    return denoiser


def entropy() -> float:
    """Bits of an 8-bit value of such a pixel."""
    edges = ((torch.arange(255, dtype=torch.float64) + 0.5) / 127.5 - 1) / STD
    below = torch.cat([torch.zeros(1), torch.special.ndtr(edges), torch.ones(1)]).double()
    share = below.diff()
    return float(-(share * share.log2()).nansum())


@pytest.mark.slow
def test_the_bound_of_the_exact_model_is_the_entropy_of_the_images():
    """Every step of it is exactly the reverse of the noise, so nothing is lost. With fixed variances something is."""
    x0, bits = images(32), {}
    for variance in ("learned", "fixed_large", "fixed_small"):
        denoiser = exact_model(200, variance=variance)
        grid = Uniform().sigmas(denoiser.config.diffusion.schedule, 200)
        found = bits_per_dimension(denoiser, x0, Conditioning(), grid, noise_of(32))
        bits[variance] = float(found.total.mean())
        assert float(found.prior.max()) < 1e-4
    assert entropy() == pytest.approx(math.log2(127.5 * STD * math.sqrt(2 * math.pi * math.e)), abs=0.02)
    assert bits["learned"] == pytest.approx(entropy(), abs=0.02)
    assert bits["learned"] + 0.02 < bits["fixed_large"] < bits["fixed_small"]


def test_a_wrong_model_costs_more_bits():
    x0, grid = images(4), Uniform().sigmas(Discrete(), 200)
    right, wrong = exact_model(), exact_model()
    estimate = wrong.net.function
    stub(wrong, lambda *inputs: estimate(*inputs) + 0.05)
    totals = [bits_per_dimension(m, x0, Conditioning(), grid, noise_of(4)).total.mean() for m in (right, wrong)]
    assert float(totals[1] - totals[0]) > 0.5


def test_fewer_steps_are_a_looser_bound():
    x0, denoiser = images(8), exact_model()
    totals = [
        float(bits_per_dimension(denoiser, x0, Conditioning(), grid, noise_of(8)).total.mean())
        for grid in (Uniform().sigmas(Discrete(), count) for count in (300, 100, 10))
    ]
    assert totals[0] < totals[1] < totals[2]


def test_a_continuous_model_is_measured_on_any_grid():
    denoiser = exact_model(schedule={"kind": "log_snr_cosine"}, variance="fixed_large")
    grid = Uniform().sigmas(LogSnrCosine(), 400)
    found = bits_per_dimension(denoiser, images(8), Conditioning(), grid, noise_of(8))
    assert entropy() < float(found.total.mean()) < entropy() + 0.4


def test_a_flow_is_measured_on_any_grid():
    flow = Flow(noise_scale=2.0)
    denoiser = small_denoiser(diffusion={"objective": "x0", "schedule": flow, "variance": "fixed_large"})

    def says(state, t, conditioning):
        level = 2 * t / (1 - t)
        return (STD**2 / (STD**2 + level**2) / (1 - t))[:, None, None, None] * state

    stub(denoiser, says)
    found = bits_per_dimension(denoiser, images(8), Conditioning(), Karras().sigmas(flow, 400), noise_of(8))
    assert entropy() < float(found.total.mean()) < entropy() + 0.4
    assert float(found.prior.max()) < 1e-4


def test_an_images_bits_do_not_depend_on_its_batch():
    x0, denoiser, noise_at = images(4), exact_model(), noise_of(4)
    grid = Uniform().sigmas(Discrete(), 20)
    batched = bits_per_dimension(denoiser, x0, Conditioning(), grid, noise_at)
    order = torch.tensor([2, 0, 3, 1])
    permuted = bits_per_dimension(denoiser, x0[order], Conditioning(), grid, lambda step: noise_at(step)[order])
    single = bits_per_dimension(denoiser, x0[2:3], Conditioning(), grid, lambda step: noise_at(step)[2:3])
    for name in ("total", "prior", "bound", "x0_mse", "noise_mse"):
        torch.testing.assert_close(getattr(permuted, name), getattr(batched, name)[order], rtol=1e-12, atol=0)
        torch.testing.assert_close(getattr(single, name), getattr(batched, name)[2:3], rtol=1e-12, atol=0)


def test_errors_by_step_are_those_of_image_and_noise():
    schedule = Discrete(num_steps=100)
    x0, denoiser, noise_at = images(2), exact_model(schedule=schedule), noise_of(2)
    found = bits_per_dimension(denoiser, x0, Conditioning(), Uniform().sigmas(schedule, 100), noise_at, clip=False)
    sigma = schedule.sigmas()[70]
    estimate = STD**2 / (STD**2 + sigma**2) * (x0 + sigma * noise_at(70))
    error = (estimate - x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.x0_mse[:, 70], error)
    noise = (x0 + sigma * noise_at(70) - estimate) / sigma
    torch.testing.assert_close(found.noise_mse[:, 70], (noise - noise_at(70)).square().mean(dim=(1, 2, 3)))


def test_a_term_is_the_kl_divergence_of_the_two_normal_distributions():
    """Written down in DDPM's coordinate, as published."""
    table = Discrete(num_steps=100).sigmas()
    kept = 1 / (1 + table**2)
    beta = 1 - kept[1:] / kept[:-1]
    generator = torch.Generator().manual_seed(0)
    x0, n, guess, says = (torch.randn(99, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    sigma, below, above = table[1:], table[:-1], torch.cat([table[2:], table[-1:]])
    wide = (slice(None), None, None, None)
    state = kept[1:].sqrt()[wide] * (x0 + sigma[wide] * n)

    def mean(image):
        first = kept[:-1].sqrt() * beta / (1 - kept[1:])
        second = (1 - beta).sqrt() * (1 - kept[:-1]) / (1 - kept[1:])
        return first[wide] * image + second[wide] * state

    tilde = beta * (1 - kept[:-1]) / (1 - kept[1:])
    share = (says + 1) / 2
    log_mine = share * beta.log()[wide] + (1 - share) * tilde.log()[wide]
    log_true = tilde.log()[wide]
    nats = log_mine - log_true - 1 + (log_true - log_mine).exp() + (mean(x0) - mean(guess)) ** 2 * (-log_mine).exp()
    expected = nats.mean(dim=(1, 2, 3)) / 2 / math.log(2)
    found = bound_term("learned_range", x0, guess, says, sigma, below, above)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_with_the_fixed_small_variance_a_term_is_a_difference_of_snr_times_the_error():
    """Kingma et al. 2021, arXiv 2107.00630, equation 13."""
    table = Discrete(num_steps=100).sigmas()
    x0, guess = images(99), images(99).flip(0)
    found = bound_term("fixed_small", x0, guess, None, table[1:], table[:-1], table[1:] + 1)
    error = (x0 - guess).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(
        found, (table[:-1] ** -2 - table[1:] ** -2) * error / 2 / math.log(2), rtol=1e-8, atol=0
    )


def test_the_last_step_is_the_likelihood_of_the_8_bit_values():
    table = Discrete(num_steps=100).sigmas()
    x0 = images(2)
    level = [torch.tensor([value], dtype=torch.float64) for value in (float(table[0]), 0.0, float(table[1]))]
    found = bound_term("fixed_small", x0, x0 + 0.01, None, *level)
    kept = 1 / (1 + table[:2] ** 2)
    std = math.sqrt(float((1 - kept[1] / kept[0]) * (1 - kept[0]) / (1 - kept[1])))
    expected = -discretised_log_likelihood(x0, x0 + 0.01, torch.full_like(x0, math.log(std))).mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected / math.log(2))


def test_8_bit_values_share_all_the_probability():
    """Against the difference of two error functions, with open bins at both ends."""
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.1, 0.02), (-1.0, 0.3), (0.9999, 0.5)):
        found = discretised_log_likelihood(values, torch.tensor(mean).double(), torch.tensor(math.log(std))).exp()
        edges = [-math.inf, *((k + 0.5) / 127.5 - 1 for k in range(255)), math.inf]
        below = [0.5 * (1 + math.erf((edge - mean) / std / math.sqrt(2))) for edge in edges]
        expected = torch.tensor([high - low for low, high in pairwise(below)]).double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
        assert float(found.sum()) == pytest.approx(1)


def test_a_value_far_off_is_dear_but_finite():
    found = discretised_log_likelihood(torch.tensor([-0.5]), torch.tensor([0.9]), torch.tensor([math.log(1e-3)]))
    assert float(found) == pytest.approx(-((1.4 - 1 / 255) ** 2) / 2e-6, rel=1e-3)


def test_the_prior_is_the_kl_divergence_from_pure_noise():
    x0 = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    kept = 1 / (1 + 3.0**2)
    expected = (kept * 0.25 + (1 - kept) - 1 - math.log(1 - kept)) / 2 / math.log(2)
    assert float(prior_term(x0, torch.tensor(3.0))) == pytest.approx(expected)


def test_one_level_is_no_bound():
    with pytest.raises(ValueError, match="two noise levels or more"):
        bits_per_dimension(exact_model(), images(1), Conditioning(), torch.tensor([1.0, 0.0]), noise_of(1))
