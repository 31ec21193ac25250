"""Samplers: from pure noise to a picture, by calling a denoiser at falling noise levels."""

from typing import Annotated

from pydantic import Field

from imagen_core.samplers.base import History, Sampler
from imagen_core.samplers.ddim import Ancestral, Ddim
from imagen_core.samplers.dpm_solver import DpmSolverPP2M
from imagen_core.samplers.encode import encode
from imagen_core.samplers.euler import Euler, Heun
from imagen_core.samplers.loop import Inpaint, sample
from imagen_core.samplers.noise import SeededNoise
from imagen_core.samplers.plms import Plms, Prk

AnySampler = Annotated[Ancestral | Ddim | Euler | Heun | DpmSolverPP2M | Plms | Prk, Field(discriminator="kind")]

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
