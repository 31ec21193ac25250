"""Fixed and learned variances, against the published formulas written down with DDPM's betas."""

from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from imagen_core.diffusion import Guidance, Threshold, guided
from imagen_core.diffusion.schedules import Discrete
from imagen_core.diffusion.steps import Uniform
from imagen_core.diffusion.variance import Variance, log_variance
from imagen_core.models import Conditioning
from imagen_core.samplers import Ancestral, SeededNoise, sample
from tests.imagen_core.diffusion.small import small_denoiser, stub

DISCRETE = Discrete(num_steps=50)
TABLE = DISCRETE.sigmas()
SIGMA = TABLE
NEXT = torch.cat([torch.zeros(1, dtype=torch.float64), TABLE[:-1]])
ABOVE = torch.cat([TABLE[1:], TABLE[-1:]])
KEPT = 1 / (1 + TABLE**2)  # alpha bar
KEPT_BEFORE = torch.cat([torch.ones(1, dtype=torch.float64), KEPT[:-1]])
BETA = 1 - KEPT / KEPT_BEFORE
NONE = Threshold(kind="none")


def tilde() -> torch.Tensor:
    """Variances of q(x_{t-1} | x_t, x_0), the first replaced by the second as published."""
    values = BETA * (1 - KEPT_BEFORE) / (1 - KEPT)
    return torch.cat([values[1:2], values[1:]])


def published(variance: str, channels: torch.Tensor) -> torch.Tensor:
    """Logarithms of the variance of p(x_{t-1} | x_t), in DDPM's coordinate."""
    if variance == "fixed_small":
        return tilde().log()
    if variance == "fixed_large":
        return torch.cat([tilde()[:1], BETA[1:]]).log()
    if variance == "learned":
        return channels
    share = channels.sigmoid() if variance == "learned_range_sigmoid" else (channels + 1) / 2
    return share * BETA.log() + (1 - share) * tilde().log()


@pytest.mark.parametrize("variance", get_args(Variance))
def test_variances_are_the_published_ones_times_the_square_of_the_coordinate(variance):
    channels = torch.linspace(-1.3, 1.4, 50, dtype=torch.float64)
    found = log_variance(variance, SIGMA, NEXT, ABOVE, channels)
    torch.testing.assert_close(found, published(variance, channels) - KEPT_BEFORE.log(), rtol=1e-9, atol=1e-9)


def test_the_ends_of_a_learned_range_are_the_fixed_ones():
    for end, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        found = log_variance("learned_range", SIGMA[1:], NEXT[1:], ABOVE[1:], torch.full_like(SIGMA[1:], end))
        torch.testing.assert_close(found, log_variance(variance, SIGMA[1:], NEXT[1:], ABOVE[1:], None))


def model(variance: str, says: float, **changes):
    """A model that estimates half of what it sees and says `says` of the variance."""
    settings = {"schedule": {"kind": "discrete", "num_steps": 50}, "objective": "x0", "variance": variance} | changes
    denoiser = small_denoiser(unet={"out_channels": 6}, diffusion=settings)
    stub(denoiser, lambda x, *_: torch.cat([x / 2, torch.full_like(x, says)], dim=1))
    return denoiser


@pytest.mark.parametrize("variance", get_args(Variance))
def test_an_ancestral_step_samples_with_the_models_variance(variance):
    step, says = 30, 0.3
    sigma, sigma_next = TABLE[step], TABLE[step - 1]
    denoise = guided(model(variance, says), Conditioning(), Guidance(), NONE)
    x = torch.full((1, 3, 8, 8), 2.0, dtype=torch.float64)
    samples = [
        Ancestral().step(denoise, x, sigma, sigma_next, lambda k=k: torch.full_like(x, k), None) for k in (0, 1)
    ]
    estimate = x / (1 + sigma**2).sqrt() / 2
    torch.testing.assert_close(samples[0], estimate + (sigma_next / sigma) ** 2 * (x - estimate))
    spread = (published(variance, torch.tensor(says, dtype=torch.float64).expand(50))[step] / 2).exp()
    torch.testing.assert_close(samples[1] - samples[0], (spread / KEPT[step - 1].sqrt()).expand_as(x))


def test_a_sampler_may_take_a_fixed_variance_instead():
    """Also for a plain function, and fixed_small is the default of ancestral sampling."""
    grid, noise = Uniform().sigmas(DISCRETE, 10), (3, 8, 8)
    sampled = {}
    for name in ("learned_range", "fixed_small", "fixed_large"):
        denoise = guided(model(name, 0.9), Conditioning(), Guidance(), NONE)
        sampled[name] = sample(Ancestral(), denoise, grid, SeededNoise([1]), noise, dtype=torch.float64)
    learned = guided(model("learned_range", 0.9), Conditioning(), Guidance(), NONE)
    for name in ("fixed_small", "fixed_large"):
        overruled = sample(Ancestral(variance=name), learned, grid, SeededNoise([1]), noise, dtype=torch.float64)
        assert torch.equal(overruled, sampled[name])

    def half(x, sigma):
        return 1 / (1 + sigma**2).sqrt() * x / 2

    plain = sample(Ancestral(), half, grid, SeededNoise([1]), noise, dtype=torch.float64)
    torch.testing.assert_close(plain, sampled["fixed_small"], rtol=1e-12, atol=0)
    assert not torch.equal(sampled["learned_range"], sampled["fixed_small"])
    assert not torch.equal(sampled["learned_range"], sampled["fixed_large"])


def test_guidance_leaves_the_variance_that_of_all_conditions():
    denoiser = small_denoiser(
        unet={"out_channels": 6},
        diffusion={"schedule": {"kind": "discrete"}, "objective": "x0", "variance": "learned_range"},
    )

    def says(x, c_noise, conditioning):
        keep = torch.ones(len(x)) if conditioning.text_keep is None else conditioning.text_keep
        keep = keep.to(x)[:, None, None, None].expand_as(x)
        return torch.cat([keep, keep], dim=1)

    stub(denoiser, says)
    text = Conditioning(text=torch.zeros(2, 3, 8), text_mask=torch.ones(2, 3, dtype=torch.bool))
    for two_passes in (False, True):
        denoise = guided(denoiser, text, Guidance(text=3.0, two_passes=two_passes), NONE)
        estimate, channels = denoise.with_variance(torch.zeros(2, 3, 8, 8), torch.tensor(1.0))
        assert torch.equal(estimate, torch.full_like(estimate, 3.0))
        assert torch.equal(channels, torch.ones_like(estimate))


def test_a_variance_learned_for_the_schedules_steps_is_refused_on_others():
    denoise = guided(model("learned", -3.0), Conditioning(), Guidance(), NONE)
    sample(Ancestral(), denoise, Uniform().sigmas(DISCRETE, 50), SeededNoise([1]), (3, 8, 8))
    with pytest.raises(ValueError, match=r"variance=learned covers the 50 steps of the schedule.*num_steps=50"):
        sample(Ancestral(), denoise, Uniform().sigmas(DISCRETE, 10), SeededNoise([1]), (3, 8, 8))


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_learned_variances_need_a_discrete_schedule_and_twice_the_channels(variance):
    with pytest.raises(ValidationError, match=f"variance={variance} needs a discrete schedule \\(got log_normal\\)"):
        small_denoiser(unet={"out_channels": 6}, diffusion={"variance": variance})
    with pytest.raises(ValidationError, match=r"twice as many unet.out_channels as in_channels \(got 3 and 3\)"):
        small_denoiser(diffusion={"variance": variance, "schedule": {"kind": "discrete"}})
