"""Grids of noise levels that sampling visits: decreasing, float64 on the CPU, with 0 at the end."""

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from imagen_core.config import Config, default_field
from imagen_core.diffusion.schedules import Discrete, Flow, NoiseSchedule, sampling_range


class Karras(Config):
    """Equal steps of sigma^(1/rho) (Karras et al. 2022, arXiv 2206.00364, equation 5)."""

    kind: Literal["karras"] = "karras"
    rho: float = Field(default=7.0, gt=0)
    """Larger puts more of the steps at low noise."""
    sigma_min: float | None = Field(default=None, gt=0)
    """Lowest noise level before 0; null means the schedule's."""
    sigma_max: float | None = Field(default=None, gt=0)
    """Highest noise level; null means the schedule's, but of a flow schedule at most 80 times its noise_scale."""

    def sigmas(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        """num_steps levels, then 0.

        Raises:
            ValueError: sigma_min is not below sigma_max.
        """
        low, high = sampling_range(schedule)
        if isinstance(schedule, Flow):  # above EDM's highest level steps change hardly anything
            high = min(high, 80 * schedule.noise_scale)
        low, high = self.sigma_min or low, self.sigma_max or high
        if not low < high:
            raise ValueError(f"sigma_min must be below sigma_max (got {low} and {high})")
        ramp = torch.linspace(high ** (1 / self.rho), low ** (1 / self.rho), num_steps, dtype=torch.float64)
        return _append_zero(ramp**self.rho)


class Uniform(Config):
    """Equal steps of the schedule's time, as DDPM takes them; of t before its shift in a flow schedule."""

    kind: Literal["uniform"] = "uniform"
    spacing: Literal["linspace", "leading", "trailing"] = default_field("linspace")
    """Which of the T steps of a discrete schedule (Lin et al. 2023, arXiv 2305.08891, table 2): linspace, from the
    lowest to the highest; leading, from the lowest at a stride of T // num_steps, so that the highest are left out;
    trailing, from the highest at a stride of T / num_steps, rounded, so that the lowest are left out. Of a flow
    schedule: linspace, from t_max to t_min, and then to 0; trailing, num_steps equal steps from t_max to 0."""
    offset: int = default_field(0, ge=0)
    """Added to each step of leading."""
    skip_lowest: bool = default_field(False)
    """Space num_steps + 1 steps and leave out the lowest, as diffusers' multistep solvers do; not for trailing."""
    shift: float | None = default_field(None, gt=0)
    """Shift of a flow schedule's t in sampling; null: the schedule's own."""

    @model_validator(mode="after")
    def _check(self) -> "Uniform":
        if self.offset and self.spacing != "leading":
            raise ValueError(f"offset is for spacing=leading (got spacing={self.spacing})")
        if self.skip_lowest and self.spacing == "trailing":
            raise ValueError("skip_lowest: spacing=trailing leaves out the lowest steps already; set it to false")
        return self

    def sigmas(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        """num_steps levels, then 0.

        Raises:
            ValueError: more steps than a discrete schedule has, or a spacing of a schedule that is not discrete.
        """
        if self.shift is not None and not isinstance(schedule, Flow):
            raise ValueError(f"grid.shift needs a flow schedule (got {schedule.kind})")
        if isinstance(schedule, Discrete):
            return _append_zero(schedule.sigmas()[self._steps(schedule.num_steps, num_steps)].flip(0))
        if isinstance(schedule, Flow):
            return _append_zero(schedule.level(self._flow_times(schedule, num_steps)))
        if self != Uniform():
            raise ValueError(f"grid.spacing, offset and skip_lowest need a discrete schedule (got {schedule.kind})")
        low, high = sampling_range(schedule)
        ends = schedule.time(torch.tensor([high, low], dtype=torch.float64))
        if num_steps == 1:
            return _append_zero(torch.tensor([high], dtype=torch.float64))
        times = torch.linspace(float(ends[0]), float(ends[1]), num_steps, dtype=torch.float64)
        return _append_zero(schedule.sigma(times))

    def _flow_times(self, schedule: Flow, num_steps: int) -> Tensor:
        """t of num_steps falling levels, float64."""
        if self.spacing == "leading" or self.skip_lowest:
            raise ValueError("grid.spacing=leading and skip_lowest need a discrete schedule (got flow)")
        shift = self.shift or schedule.shift_factor
        high, low = (t / (t + shift * (1 - t)) for t in (schedule.t_max, schedule.t_min))
        if self.spacing == "trailing" or num_steps == 1:
            times = high * (1 - torch.arange(num_steps, dtype=torch.float64) / num_steps)
        else:
            times = torch.linspace(high, low, num_steps, dtype=torch.float64)
        return shift * times / (1 + (shift - 1) * times)

    def _steps(self, total: int, num_steps: int) -> list[int]:
        """num_steps increasing step indices in [0, total)."""
        count = num_steps + self.skip_lowest
        if self.spacing == "linspace":
            return respaced_steps(total, str(count))[self.skip_lowest :]
        if self.spacing == "trailing":
            steps = [round(total * (1 - index / count)) - 1 for index in range(count)][::-1]
        else:
            steps = [index * (total // count) + self.offset for index in range(self.skip_lowest, count)]
        if count > total or steps[-1] >= total:
            raise ValueError(
                f"num_steps is {num_steps}, but grid.spacing={self.spacing} finds no {num_steps} steps in a schedule "
                f"of {total}; request fewer"
            )
        return steps


class Listed(Config):
    """Steps of a discrete schedule, one by one."""

    kind: Literal["listed"] = "listed"
    steps: tuple[int, ...] = Field(min_length=1)
    """Step indices, falling, as diffusers' `timesteps`: `[999, 800, ..., 0]`."""

    @field_validator("steps")
    @classmethod
    def _check(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        wrong = next((pair for pair in pairwise(steps) if pair[1] >= pair[0]), None)
        if wrong is not None:
            raise ValueError(f"must fall from step to step (got {wrong[0]}, {wrong[1]})")
        if steps[-1] < 0:
            raise ValueError(f"must not be below 0 (got {steps[-1]})")
        return steps

    def sigmas(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        """The levels of the listed steps, then 0.

        Raises:
            ValueError: the schedule is not discrete or has too few steps, or num_steps differs from the steps listed.
        """
        if not isinstance(schedule, Discrete):
            raise ValueError(f"grid.kind=listed needs a discrete schedule (got {schedule.kind}); use uniform")
        if self.steps[0] >= schedule.num_steps:
            raise ValueError(f"grid.steps has {self.steps[0]}, but the schedule ends at {schedule.num_steps - 1}")
        if len(self.steps) != num_steps:
            raise ValueError(f"num_steps is {num_steps}, but grid.steps has {len(self.steps)} steps")
        return _append_zero(schedule.sigmas()[list(self.steps)])


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


AnyGrid = Annotated[Karras | Uniform | Respaced | Listed, Field(discriminator="kind")]


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
