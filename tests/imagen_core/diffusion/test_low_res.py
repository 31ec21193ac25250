"""Noise-conditioning augmentation of the low-resolution image."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from imagen_core.diffusion import Denoiser, DenoiserConfig
from imagen_core.diffusion.low_res import LogNormalNoise, UniformNoise, Upsampling, add_low_res_noise, upsample
from imagen_core.diffusion.schedules import LogNormal, LogSnrLinear
from imagen_core.models import Conditioning
from tests.imagen_core.diffusion.small import small_super_denoiser

UNIFORM = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


def test_lognormal_levels_are_those_of_edm_training():
    levels = LogNormalNoise().sigma(UNIFORM)
    assert float(levels.log().mean()) == pytest.approx(-1.2, abs=1e-3)
    assert float(levels.log().std()) == pytest.approx(1.2, abs=1e-3)
    torch.testing.assert_close(levels, LogNormal().sigma(UNIFORM))
    assert LogNormalNoise().sampling_sigma == 0.002


def test_uniform_levels_are_uniform_in_the_time_of_the_schedule():
    noise = UniformNoise(max_time=0.6)
    times = LogSnrLinear().time(noise.sigma(UNIFORM))
    torch.testing.assert_close(times, 0.6 * UNIFORM, rtol=0, atol=1e-6)
    assert noise.sampling_sigma == pytest.approx(math.sqrt(math.expm1(1e-4 + 10 * 0.2**2)))


@pytest.mark.parametrize("sigma", [0.002, 0.3, 5.0])
def test_the_result_has_the_variance_of_the_closed_form(sigma):
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(4, 3, 200, 200, generator=generator, dtype=torch.float64) for _ in range(2))
    levels = torch.full((4,), sigma, dtype=torch.float64)
    scale = 1 / (levels**2 + 0.25).sqrt()
    result = add_low_res_noise(0.5 * images, levels, noise, scale)
    assert float(result.var()) == pytest.approx(1.0, rel=0.01)
    torch.testing.assert_close(result, (0.5 * images + sigma * noise) / math.sqrt(sigma**2 + 0.25))


@pytest.mark.parametrize(
    ("objective", "low_res_scale", "scale"),
    [
        ("edm", "input", lambda sigma: (sigma**2 + 0.25) ** -0.5),
        ("edm", "variance_preserving", lambda sigma: (sigma**2 + 1) ** -0.5),
        ("eps", "input", lambda sigma: (sigma**2 + 1) ** -0.5),
    ],
)
def test_the_denoiser_upsamples_then_noises_then_scales_as_it_does_its_input(objective, low_res_scale, scale):
    denoiser = small_super_denoiser(diffusion={"objective": objective}, low_res_scale=low_res_scale)
    generator = torch.Generator().manual_seed(0)
    low_res = torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.1, 2.0], dtype=torch.float64)
    conditioning = denoiser.with_low_res(Conditioning(), low_res, sigma, noise)
    column = sigma[:, None, None, None]
    torch.testing.assert_close(conditioning.low_res, scale(column) * (upsample(low_res, (8, 8)) + column * noise))
    torch.testing.assert_close(conditioning.low_res_noise, sigma.log() / 4)


@pytest.mark.parametrize(
    ("mode", "row"),
    [
        ("nearest", [-1, -1, -0.5, -0.5, 0.5, 0.5, 1, 1]),
        ("bilinear", [-1, -0.875, -0.625, -0.25, 0.25, 0.625, 0.875, 1]),
    ],
)
def test_the_low_resolution_image_is_upsampled_as_configured(mode, row):
    unet = {"low_res": True, "low_res_noise": False}
    denoiser = small_super_denoiser(unet=unet, low_res_noise=None, low_res_upsampling=mode)
    low_res = torch.tensor([-1, -0.5, 0.5, 1], dtype=torch.float64).expand(1, 3, 4, 4)
    noise = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    trained = denoiser.with_low_res(Conditioning(), low_res, torch.zeros(1), noise).low_res
    sampled = denoiser.with_sampling_low_res(Conditioning(), low_res, noise).low_res
    assert trained is not None
    torch.testing.assert_close(trained, torch.tensor(row, dtype=torch.float64).expand(1, 3, 8, 8))
    torch.testing.assert_close(sampled, trained)


def test_without_augmentation_the_image_is_only_upsampled():
    denoiser = small_super_denoiser(unet={"low_res_noise": False}, low_res_noise=None)
    low_res = torch.rand(2, 3, 4, 4) * 2 - 1
    conditioning = denoiser.with_low_res(Conditioning(), low_res, torch.tensor([1.0, 2.0]), torch.randn(2, 3, 8, 8))
    assert torch.equal(conditioning.low_res, upsample(low_res, (8, 8)))
    assert conditioning.low_res_noise is None


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        ({"kind": "lognormal", "sample_sigma": 0.01}, 0.01),
        ({"kind": "uniform", "sample_time": 0.2}, math.sqrt(math.expm1(1e-4 + 10 * 0.2**2))),
    ],
)
def test_sampling_uses_one_fixed_level(settings, level):
    denoiser = small_super_denoiser(low_res_noise=settings)
    low_res, noise = torch.zeros(2, 3, 4, 4, dtype=torch.float64), torch.ones(2, 3, 8, 8, dtype=torch.float64)
    conditioning = denoiser.with_sampling_low_res(Conditioning(), low_res, noise)
    expected = torch.full((2, 3, 8, 8), level / math.sqrt(level**2 + 0.25), dtype=torch.float64)
    torch.testing.assert_close(conditioning.low_res, expected)
    c_noise = math.log(level) / 4 if settings["kind"] == "lognormal" else -2 * math.log(level)
    torch.testing.assert_close(conditioning.low_res_noise, torch.full((2,), c_noise, dtype=torch.float64))


def test_no_noise_in_sampling_is_read_as_the_lowest_level_and_not_as_minus_infinity():
    conditioning = small_super_denoiser().with_sampling_low_res(
        Conditioning(), torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 8, 8), sigma=0.0
    )
    torch.testing.assert_close(conditioning.low_res, torch.zeros(2, 3, 8, 8))
    torch.testing.assert_close(conditioning.low_res_noise, torch.full((2,), math.log(0.002) / 4))


def test_upsampling_is_bicubic_and_stays_in_range():
    """Against Pillow, whose bicubic has another constant (-1/2 and not -3/4): close, not equal."""
    ramp = np.linspace(-0.8, 0.8, 8, dtype=np.float32)
    small = np.add.outer(ramp, ramp[::-1] / 2)
    theirs = np.asarray(Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC))
    ours = upsample(torch.from_numpy(small)[None, None], (32, 32))[0, 0]
    inner = slice(4, -4)
    assert float(np.abs(ours.numpy() - np.clip(theirs, -1, 1))[inner, inner].max()) < 0.03
    checkers = (torch.arange(8) % 2 * 2.0 - 1).expand(1, 1, 8, 8)
    assert float(upsample(checkers, (32, 32)).abs().max()) <= 1


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest", "cubic_reflect"])
def test_every_way_to_upsample_stays_in_range(mode):
    assert upsample(torch.full((1, 3, 4, 4), 1.3), (8, 8), mode).max() == 1


def test_unclipped_an_image_may_overshoot():
    checkers = (torch.arange(8) % 2 * 2.0 - 1).expand(1, 1, 8, 8)
    assert float(upsample(checkers, (32, 32), "bicubic_unclipped").abs().max()) > 1.1


def test_noise_at_the_small_size_is_upsampled_with_the_image():
    config = small_super_denoiser().config.model_dump()
    changes = {"low_res_noise_at": "low_res_px", "low_res_upsampling": "bicubic_unclipped"}
    denoiser = Denoiser(DenoiserConfig.model_validate(config | changes))
    small, noise, sigma = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    conditioning = denoiser.with_low_res(Conditioning(), small, sigma, noise)
    scale = 1 / (sigma**2 + 0.25).sqrt()
    noised = scale[:, None, None, None] * (small + sigma[:, None, None, None] * noise[..., :4, :4])
    torch.testing.assert_close(conditioning.low_res, F.interpolate(noised, (8, 8), mode="bicubic"))
    with pytest.raises(ValueError, match=r"needs low_res_upsampling=bicubic_unclipped.*\(got bicubic\)"):
        DenoiserConfig.model_validate(config | {"low_res_noise_at": "low_res_px"})


def test_an_image_of_the_right_size_is_left_alone():
    image = torch.rand(1, 3, 8, 8)
    assert torch.equal(upsample(image, (8, 8)), image)


@pytest.mark.parametrize("factor", [2, 4])
def test_cubic_reflect_is_keys_kernel_on_an_image_reflected_at_its_edges(factor: int) -> None:
    width = 6
    image = torch.rand(1, 1, width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5

    def kernel(x: float) -> float:
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    matrix = torch.zeros(factor * width, width, dtype=torch.float64)
    for row in range(factor * width):
        centre = (row + 0.5) / factor - 0.5
        for place in range(-3, width + 3):
            inside = width - 1 - abs(width - 1 - abs(place))
            matrix[row, inside] += kernel(centre - place)
    expected = (matrix @ image[0, 0] @ matrix.T).clamp(-1, 1)
    torch.testing.assert_close(upsample(image, (factor * width, factor * width), "cubic_reflect")[0, 0], expected)


def test_cubic_reflect_takes_integer_factors_only() -> None:
    with pytest.raises(ValueError, match="10 is not a multiple of 4 x 4 pixels"):
        upsample(torch.zeros(1, 3, 4, 4), (10, 10), "cubic_reflect")


@pytest.mark.parametrize("mode", ["bicubic", "bicubic_unclipped", "bilinear", "nearest", "cubic_reflect"])
def test_images_that_are_not_square_are_upsampled_as_squares_are(mode: Upsampling) -> None:
    """Far from the edges a part of a square is that part of the result."""
    image = torch.rand(1, 3, 24, 24, dtype=torch.float64) * 2 - 1
    whole = upsample(image, (48, 48), mode)
    part = upsample(image[..., 6:18, :], (24, 48), mode)
    assert part.shape == (1, 3, 24, 48)
    torch.testing.assert_close(part[..., 8:-8, 8:-8], whole[..., 20:-20, 8:-8])
    if mode == "cubic_reflect":
        with pytest.raises(ValueError, match="24 x 40 is not a multiple of 12 x 24 pixels"):
            upsample(image[..., 6:18, :], (24, 40), mode)


def test_bilinear_corners_is_a_straight_line_from_one_corner_pixel_to_the_other_and_does_not_clip():
    low_res = torch.tensor([0.0, 3.0]).expand(1, 1, 2, 2)
    line = torch.linspace(0, 3, 8).expand(1, 1, 8, 8)
    torch.testing.assert_close(upsample(low_res, (8, 8), "bilinear_corners"), line)
