"""Every sampler, picked by `kind`."""

from typing import Annotated

from imagen_core.extensions import Kinds
from imagen_core.samplers.base import Sampler
from imagen_core.samplers.ddim import Ancestral, Ddim
from imagen_core.samplers.dpm_solver import DpmSolverPP2M
from imagen_core.samplers.euler import Euler, Heun
from imagen_core.samplers.plms import Plms, Prk

AnySampler = Annotated[
    Ancestral  # one line for each
    | Ddim
    | Euler
    | Heun
    | DpmSolverPP2M
    | Plms
    | Prk,
    Kinds("pipeline.samplers", Sampler),
]
"""A sampler; other packages add kinds by entry points in `pipeline.samplers`."""
