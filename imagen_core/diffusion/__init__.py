"""Diffusion: noise schedules, objectives, the denoiser, its loss, and guidance."""

from imagen_core.diffusion.config import AnyDenoiserConfig, DenoiserConfig, DiffusionConfig, PriorConfig
from imagen_core.diffusion.denoiser import Denoiser
from imagen_core.diffusion.guidance import Denoise, Guidance, GuidedDenoiser, Threshold, guided
from imagen_core.diffusion.likelihood import Likelihood, bits_per_dimension
from imagen_core.diffusion.loss import diffusion_loss, loss_weight
from imagen_core.diffusion.schedules import NoiseSchedule

__all__ = [
    "AnyDenoiserConfig",
    "Denoise",
    "Denoiser",
    "DenoiserConfig",
    "DiffusionConfig",
    "Guidance",
    "GuidedDenoiser",
    "Likelihood",
    "NoiseSchedule",
    "PriorConfig",
    "Threshold",
    "bits_per_dimension",
    "diffusion_loss",
    "guided",
    "loss_weight",
]
