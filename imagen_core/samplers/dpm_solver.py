"""DPM-Solver++ (2M): second order with one network call per step.

Lu et al. 2022 (arXiv 2211.01095), algorithm 2. In the coordinate x = x0 + sigma n the exponential integrator over
h = ln(sigma / sigma_next) is x_next = (sigma_next / sigma) x + (1 - sigma_next / sigma) D, with D extrapolated
from the previous step to the middle of this one.
"""

from typing import Literal

from torch import Tensor

from imagen_core.diffusion.guidance import Denoise
from imagen_core.samplers.base import History, SampleNoise, Sampler


class DpmSolverPP2M(Sampler):
    """DPM-Solver++ of second order, multistep; the first and the last step are of first order."""

    kind: Literal["dpmpp_2m"] = "dpmpp_2m"

    def step(
        self, denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: SampleNoise, history: History
    ) -> Tensor:
        estimate = denoise(x, sigma)
        blended = estimate
        if history.estimate is not None and history.sigma is not None and sigma_next > 0:
            before, now = (history.sigma / sigma).log(), (sigma / sigma_next).log()
            blended = estimate + now / (2 * before) * (estimate - history.estimate)
        history.estimate, history.sigma = estimate, sigma
        ratio = sigma_next / sigma
        return ratio * x + (1 - ratio) * blended
