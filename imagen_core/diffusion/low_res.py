"""Noise-conditioning augmentation: super-resolution models are trained on noisy low-resolution images and receive the
noise level, so that they tolerate the faults of the previous stage.

Ho et al. 2022 (arXiv 2106.15282), section 4.2; Saharia et al. 2022 (arXiv 2205.11487), section 2.3.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from imagen_core.config import Config
from imagen_core.diffusion.schedules import LogNormal, LogSnrLinear, NoiseSchedule


class LogNormalNoise(Config):
    """Noise levels as in EDM training (NeMo Imagen): ln sigma is normal."""

    kind: Literal["lognormal"] = "lognormal"
    schedule: LogNormal = LogNormal()
    """Noise levels of training."""
    per: Literal["sample", "batch"] = "sample"
    """One noise level per image, or one for all images of a batch."""
    sample_sigma: float = Field(default=0.002, gt=0)
    """Noise level of sampling."""

    def sigma(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) -> noise levels of training, float64 of the same shape."""
        return self.schedule.sigma(uniform)

    @property
    def sampling_sigma(self) -> float:
        """Noise level of sampling."""
        return self.sample_sigma


class UniformNoise(Config):
    """The time of a schedule, uniform up to max_time (PaddleFleetX, MinImagen, improved-diffusion)."""

    kind: Literal["uniform"] = "uniform"
    schedule: NoiseSchedule = LogSnrLinear()
    """Noise levels by time."""
    max_time: float = Field(default=1.0, gt=0, le=1)
    """Highest time of training."""
    per: Literal["sample", "batch"] = "sample"
    """One noise level per image, or one for all images of a batch."""
    sample_time: float = Field(default=0.2, ge=0, le=1)
    """Time of the noise level of sampling."""

    def sigma(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) -> noise levels of training, float64 of the same shape."""
        return self.schedule.sigma(uniform * self.max_time)

    @property
    def sampling_sigma(self) -> float:
        """Noise level of sampling."""
        return float(self.schedule.sigma(torch.tensor([self.sample_time], dtype=torch.float64)))


LowResNoise = Annotated[LogNormalNoise | UniformNoise, Field(discriminator="kind")]


Upsampling = Literal["bicubic", "bicubic_unclipped", "bilinear", "bilinear_corners", "nearest", "cubic_reflect"]
"""cubic_reflect: the cubic kernel of a = -1/2 (Keys 1981) on an image reflected at its edges, for integer
factors (MinImagen); bicubic has a = -3/4 and repeats the edges, and unclipped it may overshoot [-1, 1] (NeMo);
bilinear_corners puts the centres of the corner pixels on each other, and does not clip (DeepFloyd IF)."""


def upsample(low_res: Tensor, shape: tuple[int, int], mode: Upsampling = "bicubic") -> Tensor:
    """(b, c, h, w) in [-1, 1] -> (b, c, *shape), antialiased if it is downsampled.

    Clipped to [-1, 1], except with bicubic_unclipped and bilinear_corners.

    Raises:
        ValueError: mode=cubic_reflect, and `shape` is not a whole multiple of (h, w).
    """
    if low_res.shape[-2:] == shape:
        return low_res
    if mode == "cubic_reflect":
        return _cubic_reflect(low_res, shape)
    if mode == "nearest":
        return F.interpolate(low_res, size=shape, mode="nearest-exact").clamp(-1, 1)
    downsamples = low_res.shape[-1] > shape[-1]
    if mode == "bilinear_corners":
        return F.interpolate(low_res, size=shape, mode="bilinear", align_corners=True)
    if mode == "bicubic_unclipped":
        return F.interpolate(low_res, size=shape, mode="bicubic", antialias=downsamples)
    return F.interpolate(low_res, size=shape, mode=mode, antialias=downsamples).clamp(-1, 1)


def _cubic_reflect(low_res: Tensor, shape: tuple[int, int]) -> Tensor:
    height, width = low_res.shape[-2:]
    factor, margin = shape[1] // width, min(3, width - 1, height - 1)
    if shape != (factor * height, factor * width):
        raise ValueError(
            f"low_res_upsampling=cubic_reflect: {shape[0]} x {shape[1]} is not a multiple of {height} x {width} pixels"
        )
    padded = F.pad(low_res, (margin,) * 4, mode="reflect")
    rows, columns = (slice(factor * margin, factor * (margin + side)) for side in (height, width))
    size = (factor * (height + 2 * margin), factor * (width + 2 * margin))
    return F.interpolate(padded, size, mode="bicubic", antialias=True)[..., rows, columns].clamp(-1, 1)


def add_low_res_noise(upsampled: Tensor, sigma: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
    """scale * (upsampled + sigma * noise), with images (b, c, h, w) and sigma and scale (b,)."""
    return scale[:, None, None, None] * (upsampled + sigma[:, None, None, None] * noise)
