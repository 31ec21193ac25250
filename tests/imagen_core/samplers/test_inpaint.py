"""Inpainting keeps the masked part of an image, and generates the rest to fit it."""

import pytest
import torch

from imagen_core.diffusion.schedules import LogNormal
from imagen_core.diffusion.steps import Karras
from imagen_core.samplers import (
    Ancestral,
    Ddim,
    DpmSolverPP2M,
    Euler,
    Heun,
    Inpaint,
    Plms,
    Prk,
    SeededNoise,
    sample,
)
from tests.imagen_core.samplers.gaussian import Gaussian, law

MEAN = torch.tensor([0.2, -0.1], dtype=torch.float64)
STD, CORRELATION = 0.5, 0.9
COVARIANCE = STD**2 * torch.tensor([[1, CORRELATION], [CORRELATION, 1]], dtype=torch.float64)


def denoise_pair(x, sigma):
    """E[x0 | x] of two correlated pixels: m + C (C + sigma^2 I)^-1 (x - m)."""
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64))
    return ((x.flatten(1) - MEAN) @ gain.T + MEAN).reshape(x.shape)


def inpainted_law(sampler, resample_times, known=0.9, num_steps=20):
    """Mean and variance of the second pixel when the first one is known."""
    image = torch.tensor([known, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    keep = torch.tensor([True, False]).reshape(1, 1, 1, 2)
    mean, covariance = law(
        sampler,
        denoise_pair,
        Karras().sigmas(LogNormal(), num_steps),
        (1, 1, 2),
        inpaint=Inpaint(image, keep, resample_times),
    )
    assert float(mean[0]) == known
    assert float(covariance[0, 0]) == 0
    return float(mean[1]), float(covariance[1, 1])


def test_the_generated_part_fits_the_kept_part_after_resampling():
    wanted_mean = float(MEAN[1]) + CORRELATION * (0.9 - float(MEAN[0]))
    wanted_variance = STD**2 * (1 - CORRELATION**2)
    errors = {times: abs(inpainted_law(Ancestral(), times)[0] - wanted_mean) for times in (1, 3, 10)}
    assert errors[10] < errors[3] < errors[1]
    mean, variance = inpainted_law(Ancestral(), 10, num_steps=50)
    assert mean == pytest.approx(wanted_mean, abs=0.02)
    assert variance == pytest.approx(wanted_variance, rel=0.25)  # a pixel sampled alone has 5 times as much


@pytest.mark.parametrize(
    "sampler", [Ancestral(), Ddim(), Euler(churn=0.2), Heun(), DpmSolverPP2M(), Plms(), Prk()], ids=lambda s: s.kind
)
def test_kept_pixels_are_exactly_those_of_the_image(sampler):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 2, 4, 4, generator=generator) * 2 - 1
    keep = torch.rand(3, 1, 4, 4, generator=generator) < 0.5
    generated = sample(
        sampler,
        Gaussian().denoise,
        Karras().sigmas(LogNormal(), 6),
        SeededNoise([0, 1, 2]),
        (2, 4, 4),
        inpaint=Inpaint(image, keep, resample_times=2),
    )
    kept = keep.expand_as(image)
    assert torch.equal(generated[kept], image[kept])
    assert not bool((generated[~kept] == image[~kept]).any())


def test_one_image_and_mask_serve_a_whole_batch_and_do_not_tie_it_together():
    image, keep = torch.zeros(1, 1, 2, 2), torch.eye(2, dtype=torch.bool).reshape(1, 1, 2, 2)

    def generate(seeds):
        return sample(
            Ancestral(),
            Gaussian().denoise,
            Karras().sigmas(LogNormal(), 5),
            SeededNoise(seeds),
            (1, 2, 2),
            inpaint=Inpaint(image, keep, resample_times=3),
        )

    torch.testing.assert_close(generate([7]), generate([5, 6, 7])[2:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("times", [1, 4])
def test_every_inpainting_step_but_the_last_is_repeated_as_often_as_configured(times):
    calls = 0

    def denoise(x, sigma):
        nonlocal calls
        calls += 1
        return torch.zeros_like(x)

    inpaint = Inpaint(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool), times)
    sample(Ddim(), denoise, Karras().sigmas(LogNormal(), 6), SeededNoise([0]), (1, 2, 2), inpaint=inpaint)
    assert calls == 5 * times + 1


def test_no_round_at_all_is_refused():
    with pytest.raises(ValueError, match="resample_times must be at least 1"):
        Inpaint(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool), resample_times=0)
