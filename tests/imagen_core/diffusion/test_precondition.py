"""The table of objectives."""

import pytest
import torch
from pydantic import ValidationError

from imagen_core.diffusion import DiffusionConfig
from imagen_core.diffusion.precondition import coefficients
from imagen_core.diffusion.schedules import Discrete

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
def test_a_perfect_network_of_every_objective_gives_the_same_image(objective):
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


@pytest.mark.parametrize("num_steps", [50, 1000])
def test_prev_predicts_the_mean_of_ddpms_state_one_step_before(num_steps):
    """Ho et al. 2020, equation 7; below the first step that is the image itself."""
    schedule = Discrete(num_steps=num_steps)
    sigma = schedule.sigmas()
    kept = 1 / (1 + sigma**2)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(num_steps, generator=generator, dtype=torch.float64) for _ in range(2))
    state = kept.sqrt() * (x0 + sigma * noise)
    beta = 1 - kept / before
    mean = before.sqrt() * beta / (1 - kept) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - kept) * state
    c = DiffusionConfig(schedule=schedule, objective="prev").coefficients(sigma)
    torch.testing.assert_close(c.skip * (x0 + sigma * noise) + c.out * mean, x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(c.input, kept.sqrt())


def test_between_two_steps_prev_goes_one_step_down():
    schedule = Discrete(num_steps=100)
    table = schedule.sigmas()
    torch.testing.assert_close(schedule.previous(table[1:]), table[:-1])
    between = (table[40] * table[41]).sqrt()
    torch.testing.assert_close(schedule.previous(between), (table[39] * table[40]).sqrt())
    assert float(schedule.previous(table[:1])) == 0
    assert 0 < float(schedule.previous((table[:1] * table[1:2]).sqrt())) < float(table[0])


def test_prev_needs_a_discrete_schedule():
    with pytest.raises(ValidationError, match=r"objective=prev needs a discrete schedule \(got log_normal\)"):
        DiffusionConfig(objective="prev")


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


def test_the_forward_process_has_the_variance_of_image_plus_noise():
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(400_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(400_000, generator=generator, dtype=torch.float64)
    for sigma in (0.1, 1.0, 10.0):
        assert float((x0 + sigma * noise).var()) == pytest.approx(0.25 + sigma**2, rel=0.01)
