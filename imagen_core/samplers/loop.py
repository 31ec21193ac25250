"""The sampling loop, shared by all samplers: image to image and inpainting included."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from imagen_core.diffusion.guidance import Denoise
from imagen_core.diffusion.schedules import Flow, NoiseSchedule
from imagen_core.samplers.base import History, Sampler
from imagen_core.samplers.noise import Noise

OnStep = Callable[[int, int, Tensor], None]
"""Called after each step as (steps done, number of steps, image (b, c, h, w) at its noise level)."""

Start = Literal["sigma", "unit_variance"]
"""Standard deviation of the noise that sampling starts from: sigma, the first noise level; unit_variance,
sqrt(1 + sigma^2), so that the state in DDPM's scale, x / sqrt(1 + sigma^2), is standard normal (diffusers). With a
flow schedule of noise scale s the latter is s + sigma, so that the state (1 - t) x is pure noise, as at t = 1."""


@dataclass(frozen=True, slots=True)
class Inpaint:
    """An image of which a part is kept (RePaint: Lugmayr et al. 2022, arXiv 2201.09865).

    Attributes:
        image: (b or 1, c, h, w) in [-1, 1].
        keep: bool (b or 1, 1, h, w), true where the image is kept.
        resample_times: how often each step is taken: after it the image is put back to the previous noise level and
            the step repeated, so that the generated part comes to fit the kept part.
    """

    image: Tensor
    keep: Tensor
    resample_times: int = 5

    def __post_init__(self) -> None:
        if self.resample_times < 1:
            raise ValueError(f"resample_times must be at least 1 (got {self.resample_times})")

    def rows(self, rows: Tensor) -> "Inpaint":
        """Image and mask of the rows of a batch chosen by bool (b,)."""
        image, keep = (t[rows.to(t.device)] if len(t) > 1 else t for t in (self.image, self.keep))
        return replace(self, image=image, keep=keep)


@torch.no_grad()
def sample(
    sampler: Sampler,
    denoise: Denoise,
    sigmas: Tensor,
    noise: Noise,
    shape: tuple[int, ...],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    init_image: Tensor | None = None,
    strength: float = 1.0,
    latent: Tensor | None = None,
    start: Start = "sigma",
    inpaint: Inpaint | None = None,
    schedule: NoiseSchedule | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Samples one image for each seed of `noise`.

    Args:
        sigmas: float64 (steps + 1,), falling, the last one 0.
        shape: (c, h, w) of an image, or (dim,) of an embedding.
        init_image: (b, c, h, w) in [-1, 1] to start from (SDEdit, Meng et al. 2022, arXiv 2108.01073).
        strength: in [0, 1]: the part of the steps that init_image goes through; 0 returns it, 1 ignores it.
        latent: (b, c, h, w), standard normal, to start from instead of random noise; `encode` computes it.
        start: how large the noise is that sampling starts from.
        schedule: lets samplers that look between two levels (prk) take the middle in its time, and heun the velocities
            of a flow.
    Returns:
        (b, c, h, w), about in [-1, 1].
    Raises:
        ValueError: a grid that does not fall to 0, or a strength outside [0, 1].
    """
    check_grid(sigmas)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1] (got {strength})")
    if latent is not None and init_image is not None:
        raise ValueError("latent and init_image both say what to start from; give one")

    normal = partial(noise.normal, shape, device, dtype)
    if init_image is None or strength == 1:
        first = 0
        x = start_std(sigmas, start, schedule) * (normal() if latent is None else latent.to(device, dtype))
    else:
        first = len(sigmas) - 1 - round(strength * (len(sigmas) - 1))
        x = init_image.to(device, dtype).expand(len(noise), *shape)
        if first < len(sigmas) - 1:
            x = x + float(sigmas[first]) * normal()
    levels = sigmas[first:].to(device=device, dtype=dtype)
    total = len(levels) - 1
    history = new_history(schedule, total)
    for done, (sigma, sigma_next) in enumerate(pairwise(levels), 1):
        if inpaint is None:
            x = sampler.step(denoise, x, sigma, sigma_next, normal, history)
        else:
            x = _inpaint_step(sampler, denoise, x, sigma, sigma_next, normal, inpaint, new_history(schedule, total))
        if on_step is not None:
            on_step(done, total, x)
    return x


def start_std(sigmas: Tensor, start: Start, schedule: NoiseSchedule | None) -> float:
    """Standard deviation of the noise that sampling starts from."""
    if isinstance(schedule, Flow):
        return float(sigmas[0]) + schedule.noise_scale * (start == "unit_variance")
    return math.hypot(float(sigmas[0]), start == "unit_variance")


def _inpaint_step(
    sampler: Sampler,
    denoise: Denoise,
    x: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    normal: Callable[[], Tensor],
    inpaint: Inpaint,
    history: History,
) -> Tensor:
    """Algorithm 1 of the paper, with a jump length of one step.

    Each step is taken like a first step, without the derivatives of previous ones.
    """
    image, keep = inpaint.image.to(x), inpaint.keep.to(x.device)
    times = inpaint.resample_times if sigma_next > 0 else 1
    for repeat in range(times):
        if repeat:
            x = x + (sigma**2 - sigma_next**2).sqrt() * normal()
        x = torch.where(keep, image + sigma * normal(), x)
        x = sampler.step(denoise, x, sigma, sigma_next, normal, replace(history, derivatives=[]))
    return torch.where(keep, image + (sigma_next * normal() if sigma_next > 0 else 0), x)


def new_history(schedule: NoiseSchedule | None, total: int) -> History:
    """The history before the first of `total` steps."""
    if schedule is None:
        return History(total=total)

    flow = schedule if isinstance(schedule, Flow) else None

    def middle(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        if flow is not None:
            return flow.level((flow.t(sigma) + flow.t(sigma_next)) / 2)
        return schedule.sigma((schedule.time(sigma) + schedule.time(sigma_next)) / 2).to(sigma)

    return History(total=total, middle=middle, flow=flow)


def check_grid(sigmas: Tensor) -> None:
    """Raises ValueError unless noise levels fall strictly and end with 0."""
    if len(sigmas) < 2 or float(sigmas[-1]) != 0 or not bool((sigmas[:-1] > sigmas[1:]).all()):
        raise ValueError(
            f"sigmas must fall strictly and end with 0 (got {sigmas.tolist()[:3]} ... {sigmas[-1:].tolist()})"
        )
