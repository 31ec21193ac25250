"""From an image to its noise and back."""

from itertools import pairwise

import pytest
import torch

from imagen_core.diffusion.schedules import Discrete, LogNormal
from imagen_core.diffusion.steps import Karras, Uniform
from imagen_core.samplers import (
    Ancestral,
    Ddim,
    DpmSolverPP2M,
    Euler,
    Heun,
    Plms,
    Prk,
    SeededNoise,
    encode,
    sample,
)
from tests.imagen_core.samplers.gaussian import Gaussian

SHAPE = (2, 3, 8, 8)
WITHOUT_NOISE = [Ddim(), Euler(), Heun(), DpmSolverPP2M(), Plms(), Prk()]


def image() -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def there_and_back(sampler, denoise, sigmas, image):
    latent = encode(sampler, denoise, sigmas, image)
    noise = SeededNoise(range(len(image)))
    return sample(sampler, denoise, sigmas, noise, SHAPE[1:], dtype=torch.float64, latent=latent)


@pytest.mark.parametrize("sampler", WITHOUT_NOISE, ids=repr)
def test_the_latent_of_a_gaussian_image_is_where_the_flow_leads(sampler):
    data, sigmas = Gaussian(), Karras().sigmas(LogNormal(), 500)
    latent = encode(sampler, data.denoise, sigmas, image())
    exact = data.flow(image(), sigmas[-2], sigmas[0]) / sigmas[0]
    torch.testing.assert_close(latent, exact, rtol=0, atol=0.03)


def two_values(x, sigma):
    """E[x0 | x] of pixels near -0.5 or 0.5: N(+-0.5, 0.2^2), each half of the time."""
    total = 0.04 + sigma**2
    share = torch.tanh(0.5 * x / total)  # of the one value over the other, as their likelihoods tell
    return (0.04 * x + sigma**2 * 0.5 * share) / total


@pytest.mark.parametrize(("sampler", "allowed"), [(Ddim(), 0.03), (Heun(), 1e-3)], ids=repr)
def test_an_image_comes_back_from_its_latent(sampler, allowed):
    """Up to the error of the solver; that of DDIM halves with twice the steps."""
    errors = []
    for num_steps in (100, 200, 400):
        back = there_and_back(sampler, two_values, Uniform().sigmas(Discrete(), num_steps), image())
        errors.append(float((back - image()).abs().mean()))
    assert errors[2] < allowed
    assert isinstance(sampler, Heun) or errors[0] > 1.7 * errors[1] > 1.7 * 1.7 * errors[2]


def test_ddims_reverse_is_equation_12_with_the_next_level_above():
    """In DDPM's coordinate: sqrt(alpha bar next) D + sqrt(1 - alpha bar next) eps."""
    data, sigmas = Gaussian(), Uniform().sigmas(Discrete(), 5)
    kept = (1 / (1 + sigmas**2)).flip(0)[1:]
    state = kept[0].sqrt() * image()
    for now, above in pairwise(kept):
        estimate = data.denoise(state / now.sqrt(), ((1 - now) / now).sqrt())
        eps = (state - now.sqrt() * estimate) / (1 - now).sqrt()
        state = above.sqrt() * estimate + (1 - above).sqrt() * eps
    expected = state / (1 - kept[-1]).sqrt()
    torch.testing.assert_close(encode(Ddim(), data.denoise, sigmas, image()), expected)


@pytest.mark.parametrize("sampler", [Ancestral(), Ddim(eta=0.5), Euler(churn=0.2)], ids=repr)
def test_a_sampler_that_adds_noise_cannot_encode(sampler):
    with pytest.raises(ValueError, match="adds noise, so it cannot encode"):
        encode(sampler, Gaussian().denoise, Karras().sigmas(LogNormal(), 5), image())


def test_encoding_reports_progress_and_refuses_a_bad_grid():
    seen = []
    encode(
        Ddim(),
        Gaussian().denoise,
        Karras().sigmas(LogNormal(), 4),
        image(),
        on_step=lambda done, total, x: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="sigmas must fall strictly"):
        encode(Ddim(), Gaussian().denoise, torch.tensor([1.0, 2.0, 0.0]), image())


def test_sampling_starts_from_a_latent_instead_of_random_noise():
    sigmas = Karras().sigmas(LogNormal(), 6)
    latent = SeededNoise([3, 4]).normal(SHAPE[1:], dtype=torch.float64)
    sampled, given = (
        sample(Heun(), Gaussian().denoise, sigmas, SeededNoise(seeds), SHAPE[1:], dtype=torch.float64, latent=latent)
        for seeds in ([3, 4], [8, 9])
    )
    assert torch.equal(given, sampled)
    noise = SeededNoise([1, 2])
    with pytest.raises(ValueError, match="latent and init_image"):
        sample(Heun(), Gaussian().denoise, sigmas, noise, SHAPE[1:], latent=latent, init_image=latent)
