"""Grids of noise levels that sampling visits: decreasing, float64 on the CPU, with 0 at the end."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from imagen_core.config import Config
from imagen_core.diffusion.schedules import Discrete, NoiseSchedule, sampling_range


class Karras(Config):
    """Equal steps of sigma^(1/rho) (Karras et al. 2022, arXiv 2206.00364, equation 5)."""

    kind: Literal["karras"] = "karras"
    rho: float = Field(default=7.0, gt=0)
    """Larger puts more of the steps at low noise."""
    sigma_min: float | None = Field(default=None, gt=0)
    """Lowest noise level before 0; null means the schedule's."""
    sigma_max: float | None = Field(default=None, gt=0)
    """Highest noise level; null means the schedule's."""

    def sigmas(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        """num_steps levels, then 0.

        Raises:
            ValueError: sigma_min is not below sigma_max.
        """
        low, high = sampling_range(schedule)
        low, high = self.sigma_min or low, self.sigma_max or high
        if not low < high:
            raise ValueError(f"sigma_min must be below sigma_max (got {low} and {high})")
        ramp = torch.linspace(high ** (1 / self.rho), low ** (1 / self.rho), num_steps, dtype=torch.float64)
        return _append_zero(ramp**self.rho)


class Uniform(Config):
    """Equal steps of the schedule's time, as DDPM takes them."""

    kind: Literal["uniform"] = "uniform"

    def sigmas(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        """num_steps levels, then 0.

        Raises:
            ValueError: more steps than a discrete schedule has.
        """
        if isinstance(schedule, Discrete):
            return Respaced(sections=str(num_steps)).sigmas(schedule, num_steps)
        low, high = sampling_range(schedule)
        ends = schedule.time(torch.tensor([high, low], dtype=torch.float64))
        if num_steps == 1:
            return _append_zero(torch.tensor([high], dtype=torch.float64))
        times = torch.linspace(float(ends[0]), float(ends[1]), num_steps, dtype=torch.float64)
        return _append_zero(schedule.sigma(times))


class Respaced(Config):
    """Steps of a discrete schedule, chosen by a string as in guided-diffusion.

    "10,15,25" divides the T steps into three sections of (nearly) equal length and takes 10 evenly spaced steps
    of the first (lowest noise), 15 of the second, 25 of the third; a section of one requested step gives its last.
    "ddim50" takes 50 steps at the integer stride that gives exactly 50.
    """

    kind: Literal["respaced"] = "respaced"
    sections: str = Field(pattern=r"^(ddim[1-9]\d*|[1-9]\d*(,[1-9]\d*)*)$")
    """Steps of each section, or ddimN."""

    def sigmas(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        """The chosen levels, then 0.

        Raises:
            ValueError: the schedule is not discrete or has too few steps, or num_steps differs from the steps chosen.
        """
        if not isinstance(schedule, Discrete):
            raise ValueError(f"grid.kind=respaced needs a discrete schedule (got {schedule.kind}); use uniform")
        steps = respaced_steps(schedule.num_steps, self.sections)
        if len(steps) != num_steps:
            raise ValueError(f"num_steps is {num_steps}, but grid.sections={self.sections} has {len(steps)} steps")
        return _append_zero(schedule.sigmas()[steps].flip(0))


AnyGrid = Annotated[Karras | Uniform | Respaced, Field(discriminator="kind")]


def respaced_steps(total: int, sections: str) -> list[int]:
    """Increasing step indices in [0, total), chosen by `sections`; see `Respaced`.

    Raises:
        ValueError: a section has fewer steps than requested, or no integer stride gives the steps of ddimN.
    """
    if sections.startswith("ddim"):
        wanted = int(sections.removeprefix("ddim"))
        if wanted > total:
            raise ValueError(f"{sections}: the schedule has {total} steps only; request {total} or fewer")
        stride = math.ceil(total / wanted)
        steps = list(range(0, total, stride))
        if len(steps) != wanted:
            raise ValueError(
                f"{sections}: no integer stride takes {wanted} of the schedule's {total} steps; "
                f"use ddim{len(steps)} or {wanted}"
            )
        return steps
    counts = [int(count) for count in sections.split(",")]
    steps = []
    for index, count in enumerate(counts):
        start, stop = total * index // len(counts), total * (index + 1) // len(counts)
        if count > stop - start:
            raise ValueError(
                f"{count} steps requested of {stop - start} (section {index + 1} of a schedule of {total} steps); "
                "request fewer"
            )
        stride = (stop - start - 1) / max(1, count - 1)
        steps += [start + round(stride * k) for k in range(count)] if count > 1 else [stop - 1]
    return steps


def _append_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, torch.zeros(1, dtype=sigmas.dtype)])
