"""D(x, sigma, conditioning) = c_skip x + c_out F(c_in x, c_noise)."""

import pytest
import torch
from pydantic import ValidationError

from imagen_core.diffusion.precondition import coefficients
from imagen_core.models import Conditioning
from tests.imagen_core.diffusion.small import small_denoiser, small_super_denoiser, stub, with_random_weights

SIGMA = torch.tensor([0.1, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("objective", ["eps", "x0", "v", "edm"])
def test_the_denoiser_is_the_table_around_the_network(objective):
    denoiser = small_denoiser(diffusion={"objective": objective})
    network = stub(denoiser, lambda x, c_noise, conditioning: torch.sin(x) + c_noise[:, None, None, None])
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c = coefficients(objective, SIGMA[:, None, None, None])
    c_noise = SIGMA.log()[:, None, None, None] / 4
    expected = c.skip * x + c.out * (torch.sin(c.input * x) + c_noise)
    torch.testing.assert_close(denoiser(x, SIGMA, Conditioning()), expected)
    torch.testing.assert_close(network.calls[0][0], c.input * x)


def test_a_discrete_schedule_tells_the_network_its_step():
    denoiser = small_denoiser(diffusion={"schedule": {"kind": "discrete"}, "objective": "eps"})
    network = stub(denoiser, lambda x, c_noise, conditioning: x)
    sigmas = denoiser.config.diffusion.schedule.sigmas()[[0, 417, 999]]
    denoiser(torch.zeros(3, 3, 8, 8), sigmas, Conditioning())
    torch.testing.assert_close(network.calls[0][1], torch.tensor([0.0, 417.0, 999.0]))


def test_learned_variance_channels_are_ignored():
    denoiser = small_denoiser(unet={"out_channels": 6}, diffusion={"objective": "x0"})
    stub(denoiser, lambda x, *_: torch.cat([x, torch.full_like(x, torch.nan)], dim=1))
    assert bool(denoiser(torch.zeros(2, 3, 8, 8), SIGMA, Conditioning()).isfinite().all())


def test_under_autocast_only_the_network_is_rounded():
    denoiser = with_random_weights(small_denoiser(), seed=0)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning = Conditioning(text=torch.randn(2, 3, 8), text_mask=torch.ones(2, 3, dtype=torch.bool))
    sigma = torch.tensor([0.002, 0.002])  # here c_skip is nearly 1: rounding x would show, rounding F would not
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        denoised = denoiser(x, sigma, conditioning)
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised, denoiser(x, sigma, conditioning), rtol=0, atol=2e-3 * 0.1)


def test_dtype_follows_the_image():
    denoiser = with_random_weights(small_denoiser(), seed=0)
    conditioning = Conditioning(text=torch.randn(2, 3, 8), text_mask=torch.ones(2, 3, dtype=torch.bool))
    x = torch.randn(2, 3, 8, 8)
    single = denoiser(x, SIGMA, conditioning)
    double = denoiser.double()(x.double(), SIGMA, conditioning.to("cpu", torch.float64))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"low_res_px": 4}, "low_res_px is 4, but unet.low_res is False"),
        ({"low_res_noise": {"kind": "lognormal"}}, "low_res_noise needs low_res_px"),
        ({"unet": {"low_res": True}}, "low_res_px is None, but unet.low_res is True"),
    ],
)
def test_a_stage_is_either_a_base_or_a_super_resolution_model(changes, words):
    with pytest.raises(ValidationError, match=words):
        small_denoiser(**changes)


def test_a_low_resolution_image_must_be_smaller():
    with pytest.raises(ValidationError, match="low_res_px must be smaller than size_px"):
        small_super_denoiser(low_res_px=8)


def test_a_network_that_reads_the_noise_level_must_be_given_one():
    with pytest.raises(ValidationError, match=r"unet\.low_res_noise reads a noise level"):
        small_super_denoiser(low_res_noise=None)
