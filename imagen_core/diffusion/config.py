"""Configuration of the diffusion process and of a denoiser."""

from typing import Literal

from pydantic import Field, model_validator

from imagen_core.config import Config
from imagen_core.diffusion.low_res import LowResNoise
from imagen_core.diffusion.precondition import Objective
from imagen_core.diffusion.schedules import LogNormal, NoiseSchedule
from imagen_core.models import UNetConfig

LossKind = Literal["l1", "l2", "huber"]
WeightKind = Literal["none", "p2", "min_snr", "snr_plus_one", "edm"]


class DiffusionConfig(Config):
    """Noise levels, what the network predicts, and the loss."""

    schedule: NoiseSchedule = LogNormal()
    """Noise levels of training."""
    objective: Objective = "edm"
    """What the network predicts."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the pictures, for the edm objective."""
    loss: LossKind = "l2"
    """Distance between the network's output and its target."""
    weight: WeightKind = "none"
    """Weight by noise level; none weighs the network's output alike everywhere (for edm that is the paper's)."""
    p2_k: float = Field(default=1.0, gt=0)
    """k of the p2 weight."""
    p2_gamma: float = Field(default=0.5, ge=0, le=2)
    """gamma of the p2 weight; larger puts less weight on low noise. Above 2 training is known to fail."""
    min_snr_gamma: float = Field(default=5.0, gt=0)
    """gamma of the min-SNR weight."""


class DenoiserConfig(Config):
    """One stage of a cascade: a UNet and the diffusion it is trained with."""

    unet: UNetConfig
    """The network; `{preset: NAME}` takes a published one."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""
    size_px: int = Field(ge=1)
    """Side of the pictures it makes."""
    low_res_px: int | None = Field(default=None, ge=1)
    """Side of the pictures it enlarges; null for a base model."""
    low_res_noise: LowResNoise | None = None
    """Noise-conditioning augmentation of the low-resolution picture."""

    @model_validator(mode="after")
    def _check(self) -> "DenoiserConfig":
        if self.unet.low_res != (self.low_res_px is not None):
            raise ValueError(
                f"low_res_px is {self.low_res_px}, but unet.low_res is {self.unet.low_res}; a super-resolution stage "
                "has both, a base model neither"
            )
        if self.low_res_px is not None and self.low_res_px >= self.size_px:
            raise ValueError(f"low_res_px must be smaller than size_px (got {self.low_res_px} and {self.size_px})")
        if self.unet.low_res_noise and self.low_res_noise is None:
            raise ValueError("low_res_noise: unet.low_res_noise reads a noise level; give {kind: lognormal}")
        if self.low_res_noise is not None and self.low_res_px is None:
            raise ValueError("low_res_noise needs low_res_px: a base model has no low-resolution picture")
        if self.size_px % self.unet.sides_divisor:
            raise ValueError(f"size_px must be a multiple of {self.unet.sides_divisor} (got {self.size_px})")
        return self
