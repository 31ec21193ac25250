"""Euler steps that may go less or more far."""

from typing import Literal

from torch import Tensor

from imagen_core.diffusion.guidance import Denoise
from imagen_core.samplers.base import History, SampleNoise, Sampler, derivative


class RelaxedEuler(Sampler):
    """Euler steps of the probability flow, each multiplied by `relaxation`; at 1 it is Euler's method."""

    kind: Literal["relaxed_euler"] = "relaxed_euler"
    relaxation: float = 1.0
    """Factor of each step."""

    def step(
        self, denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: SampleNoise, history: History
    ) -> Tensor:
        return x + self.relaxation * (sigma_next - sigma) * derivative(x, denoise(x, sigma), sigma)
