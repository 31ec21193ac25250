"""The sampling loop, shared by all samplers: image to image and inpainting included."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imagen_core.diffusion.guidance import Denoise
from imagen_core.diffusion.schedules import NoiseSchedule
from imagen_core.samplers.base import History, Sampler
from imagen_core.samplers.noise import SeededNoise

OnStep = Callable[[int, int, Tensor], None]
"""Called after each step as (steps done, number of steps, picture (b, c, h, w) at its noise level)."""


@dataclass(frozen=True, slots=True)
class Inpaint:
    """A picture of which a part is kept (RePaint: Lugmayr et al. 2022, arXiv 2201.09865).

    Attributes:
        image: (b or 1, c, h, w) in [-1, 1].
        keep: bool (b or 1, 1, h, w), true where the image is kept.
        resample_times: how often each step is taken: after it the picture is put back to the noise before and
            the step repeated, so that the drawn part comes to fit the kept one.
    """

    image: Tensor
    keep: Tensor
    resample_times: int = 5

    def __post_init__(self) -> None:
        if self.resample_times < 1:
            raise ValueError(f"resample_times must be at least 1 (got {self.resample_times})")


@torch.no_grad()
def sample(
    sampler: Sampler,
    denoise: Denoise,
    sigmas: Tensor,
    noise: SeededNoise,
    shape: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    init_image: Tensor | None = None,
    strength: float = 1.0,
    inpaint: Inpaint | None = None,
    schedule: NoiseSchedule | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw one picture for each seed of `noise`.

    Args:
        sigmas: float64 (steps + 1,), falling, the last one 0.
        shape: (c, h, w) of a picture.
        init_image: (b, c, h, w) in [-1, 1] to start from (SDEdit, Meng et al. 2022, arXiv 2108.01073).
        strength: in [0, 1]: the part of the steps that init_image goes through; 0 returns it, 1 ignores it.
        schedule: lets samplers that look between two levels (prk) take the middle in its time.
    Returns:
        (b, c, h, w), about in [-1, 1].
    Raises:
        ValueError: a grid that does not fall to 0, or a strength outside [0, 1].
    """
    _check_grid(sigmas)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1] (got {strength})")

    def draw() -> Tensor:
        return noise.draw(shape, device, dtype)

    if init_image is None or strength == 1:
        first = 0
        x = float(sigmas[0]) * draw()
    else:
        first = len(sigmas) - 1 - round(strength * (len(sigmas) - 1))
        x = init_image.to(device, dtype).expand(len(noise), *shape)
        if first < len(sigmas) - 1:
            x = x + float(sigmas[first]) * draw()
    levels = sigmas.to(device=device, dtype=dtype)
    history, total = _history(schedule), len(sigmas) - 1 - first
    for index in range(first, len(sigmas) - 1):
        sigma, sigma_next = levels[index], levels[index + 1]
        if inpaint is None:
            x = sampler.step(denoise, x, sigma, sigma_next, draw, history)
        else:
            x = _inpaint_step(sampler, denoise, x, sigma, sigma_next, draw, inpaint, _history(schedule))
        if on_step is not None:
            on_step(index + 1 - first, total, x)
    return x


def _inpaint_step(
    sampler: Sampler,
    denoise: Denoise,
    x: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    draw: Callable[[], Tensor],
    inpaint: Inpaint,
    history: History,
) -> Tensor:
    """Algorithm 1 of the paper, with a jump length of one step. Each step is taken as a first one: history is new."""
    image, keep = inpaint.image.to(x), inpaint.keep.to(x.device)
    times = inpaint.resample_times if sigma_next > 0 else 1
    for repeat in range(times):
        if repeat:
            x = x + (sigma**2 - sigma_next**2).sqrt() * draw()
        x = torch.where(keep, image + sigma * draw(), x)
        x = sampler.step(denoise, x, sigma, sigma_next, draw, History(middle=history.middle))
    return torch.where(keep, image + (sigma_next * draw() if sigma_next > 0 else 0), x)


def _history(schedule: NoiseSchedule | None) -> History:
    if schedule is None:
        return History()

    def middle(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return schedule.sigma((schedule.time(sigma) + schedule.time(sigma_next)) / 2).to(sigma)

    return History(middle=middle)


def _check_grid(sigmas: Tensor) -> None:
    if len(sigmas) < 2 or float(sigmas[-1]) != 0 or not bool((sigmas[:-1] > sigmas[1:]).all()):
        raise ValueError(
            f"sigmas must fall strictly and end with 0 (got {sigmas.tolist()[:3]} ... {sigmas[-1:].tolist()})"
        )
