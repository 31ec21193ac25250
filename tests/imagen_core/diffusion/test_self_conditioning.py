"""A network is shown its own earlier estimate: in training for some rows, in sampling at every step but the first."""

from dataclasses import replace

import torch

from imagen_core.diffusion import Guidance, Threshold, guided
from imagen_core.diffusion.self_conditioning import with_own_estimate
from imagen_core.models import Conditioning
from tests.imagen_core.diffusion.small import small_denoiser, with_random_weights


def denoiser():
    model = small_denoiser(unet={"self_conditioning": True, "text_dim": None, "attention_type": "self"})
    return with_random_weights(model, seed=0).double()


def noise(rows=2, seed=0):
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_rows_chosen_are_shown_what_the_network_says_without_an_estimate():
    model, x0, sigma = denoiser(), noise(seed=1).clamp(-1, 1), torch.tensor([0.5, 2.0], dtype=torch.float64)
    shown = with_own_estimate(model, x0, sigma, noise(), Conditioning(), torch.tensor([True, False])).estimate
    first = model(x0 + sigma.view(2, 1, 1, 1) * noise(), sigma, Conditioning())
    assert shown is not None
    torch.testing.assert_close(shown[0], first[0])
    assert not shown[1].any()
    assert not shown.requires_grad


@torch.no_grad()
def test_each_step_of_sampling_is_shown_the_estimate_of_the_step_before():
    model, x, sigma = denoiser(), noise(), torch.tensor(1.5, dtype=torch.float64)
    denoise = guided(model, Conditioning(), Guidance(), Threshold(kind="static"))
    first, second = denoise(x, sigma), denoise(x, sigma)
    level = sigma.expand(2)
    torch.testing.assert_close(first, model(x, level, Conditioning()).clamp(-1, 1))
    torch.testing.assert_close(second, model(x, level, replace(Conditioning(), estimate=first)).clamp(-1, 1))
    assert not torch.allclose(first, second)
