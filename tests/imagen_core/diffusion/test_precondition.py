"""The table of objectives."""

import pytest
import torch

from imagen_core.diffusion.precondition import coefficients

OBJECTIVES = ["eps", "x0", "v", "edm"]
SIGMA = torch.logspace(-2, 2, 41, dtype=torch.float64)


def output_of_a_perfect_network(objective, x0, noise, sigma):
    """What each objective's network predicts, written down in the variance-preserving coordinate."""
    alpha, level = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    if objective == "eps":
        return noise
    if objective == "x0":
        return x0
    if objective == "v":
        return alpha * noise - level * x0
    total = (sigma**2 + 0.25).sqrt()
    return (x0 - 0.25 / total**2 * (x0 + sigma * noise)) * total / (sigma * 0.5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_perfect_network_of_every_objective_gives_the_same_picture(objective):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(len(SIGMA), generator=generator, dtype=torch.float64) for _ in range(2))
    c = coefficients(objective, SIGMA)
    denoised = c.skip * (x0 + SIGMA * noise) + c.out * output_of_a_perfect_network(objective, x0, noise, SIGMA)
    torch.testing.assert_close(denoised, x0, rtol=0, atol=1e-10)


@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_the_network_sees_the_variance_preserving_state(objective):
    alpha = coefficients(objective, SIGMA).input
    level = alpha * SIGMA
    torch.testing.assert_close(alpha**2 + level**2, torch.ones_like(SIGMA))
    torch.testing.assert_close(2 * (alpha / level).log(), -2 * SIGMA.log())


@pytest.mark.parametrize("sigma_data", [0.25, 0.5, 1.0])
def test_edm_input_and_target_have_unit_variance(sigma_data):
    """Karras et al. 2022, appendix B.6, for independent pixels of standard deviation sigma_data."""
    c = coefficients("edm", SIGMA, sigma_data)
    torch.testing.assert_close(c.input**2 * (sigma_data**2 + SIGMA**2), torch.ones_like(SIGMA))
    target_variance = ((1 - c.skip) ** 2 * sigma_data**2 + c.skip**2 * SIGMA**2) / c.out**2
    torch.testing.assert_close(target_variance, torch.ones_like(SIGMA))


def test_edm_takes_the_skip_that_amplifies_errors_least():
    c = coefficients("edm", SIGMA, 0.5)

    def spread(skip):
        return (1 - skip) ** 2 * 0.5**2 + skip**2 * SIGMA**2

    for change in (-1e-3, 1e-3):
        assert bool((spread(c.skip) < spread(c.skip + change)).all())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_have_the_dtype_of_sigma(objective, dtype):
    c = coefficients(objective, SIGMA.to(dtype))
    assert {c.skip.dtype, c.out.dtype, c.input.dtype} == {dtype}


def test_the_forward_process_has_the_variance_of_picture_plus_noise():
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(400_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(400_000, generator=generator, dtype=torch.float64)
    for sigma in (0.1, 1.0, 10.0):
        assert float((x0 + sigma * noise).var()) == pytest.approx(0.25 + sigma**2, rel=0.01)
