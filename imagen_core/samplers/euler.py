"""Euler and Heun steps of the probability flow, with EDM's stochastic churn.

Karras et al. 2022 (arXiv 2206.00364), algorithms 1 and 2.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from imagen_core.diffusion.guidance import Denoise
from imagen_core.samplers.base import History, SampleNoise, Sampler


class Euler(Sampler):
    """First order: one network call per step. Without churn it is DDIM, and Euler's step of a flow's velocity."""

    kind: Literal["euler"] = "euler"
    churn: float = Field(default=0.0, ge=0, le=math.sqrt(2) - 1)
    """Noise is raised by this factor before a step (gamma of the paper: S_churn / steps, at most sqrt(2) - 1)."""
    churn_sigma_min: float = Field(default=0.0, ge=0)
    """Churn only above this level (S_tmin)."""
    churn_sigma_max: float | None = Field(default=None, gt=0)
    """Churn only below this level (S_tmax)."""
    churn_noise: float = Field(default=1.0, gt=0)
    """Standard deviation of the noise added (S_noise)."""

    def step(
        self, denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: SampleNoise, history: History
    ) -> Tensor:
        x, sigma = self._churned(x, sigma, noise)
        estimate = denoise(x, sigma)
        return estimate + sigma_next / sigma * (x - estimate)  # exact also where sigma is large

    def _churned(self, x: Tensor, sigma: Tensor, noise: SampleNoise) -> tuple[Tensor, Tensor]:
        if self.churn == 0 or not self.churn_sigma_min <= float(sigma) <= (self.churn_sigma_max or math.inf):
            return x, sigma
        raised = sigma * (1 + self.churn)
        return x + (raised**2 - sigma**2).sqrt() * self.churn_noise * noise(), raised


class Heun(Euler):
    """Second order: two network calls per step, but one at the last step.

    With a flow schedule it takes the mean of two velocities dx_t/dt, else that of two slopes dx/dsigma.
    """

    kind: Literal["heun"] = "heun"  # type: ignore[assignment]

    def step(
        self, denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: SampleNoise, history: History
    ) -> Tensor:
        x, sigma = self._churned(x, sigma, noise)
        slope = history.slope(x, denoise(x, sigma), sigma)
        ahead = history.move(x, slope, sigma, sigma_next)
        if sigma_next == 0:
            return ahead
        slope_ahead = history.slope(ahead, denoise(ahead, sigma_next), sigma_next)
        return history.move(x, torch.lerp(slope, slope_ahead, 0.5), sigma, sigma_next)
