"""Samplers: from pure noise to an image, by calling a denoiser at falling noise levels."""

from imagen_core.samplers.base import History, Sampler
from imagen_core.samplers.ddim import Ancestral, Ddim
from imagen_core.samplers.dpm_solver import DpmSolverPP2M
from imagen_core.samplers.encode import encode
from imagen_core.samplers.euler import Euler, Heun
from imagen_core.samplers.loop import Inpaint, sample
from imagen_core.samplers.noise import SeededNoise
from imagen_core.samplers.plms import Plms, Prk
from imagen_core.samplers.registry import AnySampler

__all__ = [
    "Ancestral",
    "AnySampler",
    "Ddim",
    "DpmSolverPP2M",
    "Euler",
    "Heun",
    "History",
    "Inpaint",
    "Plms",
    "Prk",
    "Sampler",
    "SeededNoise",
    "encode",
    "sample",
]
