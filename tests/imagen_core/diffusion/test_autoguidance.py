"""Autoguidance: a worse model as the guide, by its formula and on Gaussians with a closed form."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from imagen_core.diffusion import Denoiser, Guidance, Threshold, guided
from imagen_core.models import Conditioning
from imagen_core.samplers import Euler, SeededNoise, sample
from tests.imagen_core.diffusion.small import small_denoiser, stub, with_random_weights
from tests.imagen_core.diffusion.test_guidance import image, text

NONE = Threshold(kind="none")
SIGMA = torch.tensor(0.7, dtype=torch.float64)


def says(captioned: float, dropped: float) -> Denoiser:
    """D is one number with a caption, and another one without."""
    denoiser = small_denoiser(diffusion={"objective": "x0"})

    def function(x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        keep = torch.ones(len(x), dtype=torch.bool) if conditioning.text_keep is None else conditioning.text_keep
        return torch.where(keep[:, None, None, None], captioned, dropped).to(x).expand_as(x)

    stub(denoiser, function)
    return denoiser


@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize(
    ("of_text", "weight", "expected"),
    [
        (1.0, 1.0, 5.0),
        (1.0, 3.0, 3 * 5.0 - 2 * 4.0),
        (2.0, 1.0, 2 * 5.0 - 1.0),
        (2.0, 3.0, 1.0 + 2 * (5.0 - 1.0) + 2 * (5.0 - 4.0)),
        (0.0, 3.0, 1.0 + 2 * (5.0 - 4.0)),
        (1.0, 0.0, 4.0),
    ],
)
def test_the_difference_to_the_guide_is_added_with_its_weight(
    of_text: float, weight: float, expected: float, two_passes: bool
) -> None:
    guidance = Guidance(text=of_text, autoguidance=weight, two_passes=two_passes)
    denoise = guided(says(5.0, 1.0), text(), guidance, NONE, says(4.0, 99.0))
    torch.testing.assert_close(denoise(image(), SIGMA), torch.full((2, 3, 8, 8), expected, dtype=torch.float64))


def test_outside_of_the_interval_the_guide_is_not_asked() -> None:
    guide = says(4.0, 4.0)
    guidance = Guidance(text=2.0, autoguidance=3.0, after_sigma=2.0, until_sigma=0.5)
    denoise = guided(says(5.0, 1.0), text(), guidance, NONE, guide)
    values = [float(denoise(image(), torch.tensor(level).double())[0, 0, 0, 0]) for level in (3.0, 1.0, 0.1)]
    assert values == pytest.approx([5.0, 11.0, 5.0])
    assert isinstance(guide.net, nn.Module)
    assert len(guide.net.calls) == 1  # type: ignore[arg-type]


def test_weight_1_is_the_model_alone_exactly() -> None:
    denoiser, guide = (with_random_weights(small_denoiser(), seed).double() for seed in (0, 1))
    with torch.no_grad():
        alone = guided(denoiser, text(), Guidance(text=2.0), NONE)(image(), SIGMA)
        assert torch.equal(guided(denoiser, text(), Guidance(text=2.0), NONE, guide)(image(), SIGMA), alone)
        with_guide = guided(denoiser, text(), Guidance(text=2.0, autoguidance=2.0), NONE, guide)(image(), SIGMA)
    assert float((with_guide - alone).abs().max()) > 1e-3


def test_the_threshold_comes_after_it() -> None:
    denoise = guided(says(0.9, 0.0), text(), Guidance(autoguidance=2.0), Threshold(kind="static"), says(0.1, 0.0))
    torch.testing.assert_close(denoise(image(), SIGMA), torch.ones(2, 3, 8, 8, dtype=torch.float64))


def test_a_guide_that_reads_estimates_is_shown_those_of_the_guided_model() -> None:
    guide = small_denoiser(unet={"self_conditioning": True}, diffusion={"objective": "x0"})
    network = stub(guide, lambda x, c_noise, conditioning: torch.zeros_like(x))
    denoise = guided(says(0.25, 0.0), text(), Guidance(autoguidance=2.0), NONE, guide)
    denoise(image(), SIGMA)
    denoise(image(), SIGMA)
    assert [call[2].estimate is None for call in network.calls] == [True, False]
    torch.testing.assert_close(network.calls[1][2].estimate, torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64))


def test_autoguidance_without_a_guide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance.autoguidance is 2, but there is no guide; give one"):
        guided(small_denoiser(), text(), Guidance(autoguidance=2.0), NONE)


class Gaussian(nn.Module):
    """The exact denoiser of data of mean 0 and this standard deviation."""

    def __init__(self, std: float):
        super().__init__()
        self.std = std
        self.config = SimpleNamespace(
            diffusion=SimpleNamespace(variance="fixed_small"), network=SimpleNamespace(self_conditioning=False)
        )

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        s = sigma[:, None, None, None]
        return x * self.std**2 / (self.std**2 + s**2)


@pytest.mark.parametrize("weight", [1.0, 2.0, 3.0])
def test_guided_samples_of_a_gaussian_have_the_closed_forms_scale(weight: float) -> None:
    """The flow dx/dsigma = (x - D)/sigma of D = w D_1 + (1 - w) D_0 takes x to x prod (s_i^2 / (s_i^2 + S^2))^(w_i/2)
    from the noise level S."""
    model, guide, largest = 0.5, 0.8, 20.0
    denoise = guided(
        Gaussian(model),  # type: ignore[arg-type]
        Conditioning(),
        Guidance(autoguidance=weight),
        NONE,
        Gaussian(guide),  # type: ignore[arg-type]
    )
    sigmas = torch.cat([torch.logspace(0, -5, 3000, 10, dtype=torch.float64) * largest, torch.zeros(1).double()])
    shape = (1, 2, 2)
    found = sample(Euler(), denoise, sigmas, SeededNoise([3]), shape, dtype=torch.float64)
    start = largest * SeededNoise([3]).normal(shape, "cpu", torch.float64)
    scales = [(std**2 / (std**2 + largest**2)) ** 0.5 for std in (model, guide)]
    expected = start * scales[0] ** weight * scales[1] ** (1 - weight)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    if weight > 1:  # narrower than the data: away from what the guide spreads to
        assert float(found.abs().sum()) < float((start * scales[0]).abs().sum())
