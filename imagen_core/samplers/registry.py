"""Every sampler, by its `kind`."""

from typing import Annotated

from pydantic import Field

from imagen_core.samplers.ddim import Ancestral, Ddim
from imagen_core.samplers.dpm_solver import DpmSolverPP2M
from imagen_core.samplers.euler import Euler, Heun
from imagen_core.samplers.plms import Plms, Prk

AnySampler = Annotated[Ancestral | Ddim | Euler | Heun | DpmSolverPP2M | Plms | Prk, Field(discriminator="kind")]
