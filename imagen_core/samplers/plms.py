"""PLMS and PRK: pseudo numerical methods for diffusion models.

Liu et al. 2022 (arXiv 2202.09778). The noise estimate eps = (x - D) / sigma is combined as in classical methods
(Adams-Bashforth, Runge-Kutta) and moved by DDIM's transfer, which in the coordinate x = x0 + sigma n is
x + (sigma_next - sigma) eps. With a flow schedule the same is done with velocities and t.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from imagen_core.diffusion.guidance import Denoise
from imagen_core.samplers.base import History, SampleNoise, Sampler

_ADAMS_BASHFORTH = {
    2: (-1 / 2, 3 / 2),
    3: (5 / 12, -16 / 12, 23 / 12),
    4: (-9 / 24, 37 / 24, -59 / 24, 55 / 24),
}
"""Weights of the last slopes, oldest first (equations 9 and 12 of the paper)."""


class _Multistep(Sampler):
    """Base of both: DDIM steps at the ends, where the noise estimate changes fast."""

    ddim_first_steps: int = Field(default=0, ge=0)
    """DDIM steps at the start; the estimates made there are remembered."""
    ddim_last_steps: int = Field(default=0, ge=0)
    """DDIM steps at the end."""

    def _counted(self, history: History, slope: Tensor) -> bool:
        """Records a step's first slope; returns whether it must be a DDIM step."""
        history.derivatives.append(slope)
        del history.derivatives[:-4]
        history.num_steps += 1
        left = history.total - history.num_steps
        return history.num_steps <= self.ddim_first_steps or (self.ddim_last_steps > 0 and left < self.ddim_last_steps)


class Plms(_Multistep):
    """Linear multistep, one network call per step; the first step takes two (improved Euler).

    The weights assume equal steps: on a grid that is uneven in sigma the order of convergence falls to two.
    """

    kind: Literal["plms"] = "plms"

    def step(
        self, denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: SampleNoise, history: History
    ) -> Tensor:
        slope = history.slope(x, denoise(x, sigma), sigma)
        ddim = self._counted(history, slope)
        if not ddim and len(history.derivatives) > 1:
            return history.move(x, _combined(history.derivatives), sigma, sigma_next)
        ahead = history.move(x, slope, sigma, sigma_next)
        if ddim or sigma_next == 0:
            return ahead
        slope_ahead = history.slope(ahead, denoise(ahead, sigma_next), sigma_next)
        return history.move(x, torch.lerp(slope, slope_ahead, 0.5), sigma, sigma_next)


class Prk(_Multistep):
    """Pseudo Runge-Kutta of fourth order: four network calls per step; then PLMS if `num_steps` is given."""

    kind: Literal["prk"] = "prk"
    num_steps: int | None = Field(default=None, ge=1)
    """Runge-Kutta steps at the start, before PLMS continues (3 in the paper); null: all steps."""

    def step(
        self, denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: SampleNoise, history: History
    ) -> Tensor:
        first = history.slope(x, denoise(x, sigma), sigma)
        ddim = self._counted(history, first)
        multistep = self.num_steps is not None and history.num_steps - self.ddim_first_steps > self.num_steps
        if multistep and not ddim:
            return history.move(x, _combined(history.derivatives), sigma, sigma_next)
        if ddim or sigma_next == 0:
            return history.move(x, first, sigma, sigma_next)

        def slope_at(slope: Tensor, level: Tensor) -> Tensor:
            """The slope at this level, where that slope leads."""
            point = history.move(x, slope, sigma, level)
            return history.slope(point, denoise(point, level), level)

        middle = history.middle(sigma, sigma_next)
        second = slope_at(first, middle)
        third = slope_at(second, middle)
        fourth = slope_at(third, sigma_next)
        return history.move(x, (first + 2 * second + 2 * third + fourth) / 6, sigma, sigma_next)


def _combined(past: list[Tensor]) -> Tensor:
    """Adams-Bashforth combination of up to four slopes, oldest first."""
    if len(past) == 1:
        return past[0]
    weights = _ADAMS_BASHFORTH[len(past)]
    return sum((weight * slope for weight, slope in zip(weights, past, strict=True)), torch.zeros_like(past[0]))
