"""From an image to the noise it can be sampled from: the probability flow followed upwards.

Song et al. 2021 (arXiv 2010.02502), section 4.3: DDIM without fresh noise is a step of an ordinary differential
equation, which can be taken in both directions.
"""

import torch
from torch import Tensor

from imagen_core.diffusion.guidance import Denoise
from imagen_core.diffusion.schedules import NoiseSchedule
from imagen_core.samplers.base import Sampler
from imagen_core.samplers.loop import OnStep, check_grid, new_history


@torch.no_grad()
def encode(
    sampler: Sampler,
    denoise: Denoise,
    sigmas: Tensor,
    image: Tensor,
    *,
    schedule: NoiseSchedule | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The `latent` from which `sample`, with the same denoiser and grid, generates this image again.

    The image is taken to be at the lowest noise level; then the sampler goes up the grid. It comes back up to the
    sampler's error, which falls with the number of steps. Guidance makes that error large, and a threshold that clips
    cannot be undone: encode with `Guidance()` and `Threshold(kind="none")`.

    Args:
        sampler: one that adds no noise: ddim with eta 0, euler or heun without churn, dpmpp_2m, plms, prk.
        sigmas: float64 (steps + 1,), falling, the last one 0: the grid of `sample`.
        image: (b, c, h, w) in [-1, 1].
    Returns:
        (b, c, h, w) in the dtype of the image, standard normal if the model is right.
    Raises:
        ValueError: the sampler adds noise, or a grid that does not fall to 0.
    """
    check_grid(sigmas)

    def no_noise() -> Tensor:
        raise ValueError(f"{sampler!r} adds noise, so it cannot encode; use ddim with eta=0, or heun")

    levels = sigmas[:-1].flip(0).to(image)
    history, total, x = new_history(schedule, len(levels) - 1), len(levels) - 1, image
    for index in range(total):
        x = sampler.step(denoise, x, levels[index], levels[index + 1], no_noise, history)
        if on_step is not None:
            on_step(index + 1, total, x)
    return x / levels[-1]
