"""DDIM and ancestral sampling: steps of the posterior q(x_next | x, x0) with D in place of x0.

Song et al. 2021 (arXiv 2010.02502), equations 12 and 16; Ho et al. 2020 (arXiv 2006.11239), equation 7. In the
coordinate x = x0 + sigma n the posterior has mean D + (sigma_next / sigma)^2 (x - D) and variance
u^2 = sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2; DDIM samples eta^2 u^2 of it and keeps the rest in (x - D).
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from imagen_core.config import default_field
from imagen_core.diffusion.guidance import Denoise, GuidedDenoiser
from imagen_core.diffusion.variance import log_variance
from imagen_core.samplers.base import History, SampleNoise, Sampler


class Ddim(Sampler):
    """DDIM: deterministic at eta 0, ancestral at eta 1."""

    kind: Literal["ddim"] = "ddim"
    eta: float = Field(default=0.0, ge=0, le=1)
    """Share of fresh noise."""
    kept_noise: Literal["of_threshold", "of_network"] = default_field("of_threshold")
    """The noise that a step keeps: what is left of x without the estimate after the threshold; or before it, which is
    the network's own estimate of the noise (diffusers' default, DeepFloyd IF)."""

    def step(
        self, denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: SampleNoise, history: History
    ) -> Tensor:
        if self.kept_noise == "of_network" and isinstance(denoise, GuidedDenoiser):
            unclipped, _ = denoise.unclipped(x, sigma)
            return posterior_step(x, denoise.clip(unclipped), sigma, sigma_next, self.eta, noise, unclipped)
        return posterior_step(x, denoise(x, sigma), sigma, sigma_next, self.eta, noise)


class Ancestral(Sampler):
    """DDPM's own sampler: x_next is sampled from p(x_next | x) at every step; with fixed_small variance it is DDIM
    with eta 1."""

    kind: Literal["ancestral"] = "ancestral"
    variance: Literal["fixed_small", "fixed_large"] | None = None
    """Variance of each step; null: as the model was trained for (fixed_small unless its diffusion.variance says
    otherwise)."""

    def step(
        self, denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: SampleNoise, history: History
    ) -> Tensor:
        if isinstance(denoise, GuidedDenoiser):
            estimate, channels = denoise.with_variance(x, sigma)
            variance = self.variance or denoise.diffusion.variance
        else:
            estimate, channels = denoise(x, sigma), None
            variance = self.variance or "fixed_small"
        if variance == "fixed_small" or sigma_next == 0:
            return posterior_step(x, estimate, sigma, sigma_next, 1.0, noise)
        if isinstance(denoise, GuidedDenoiser) and variance == "learned":
            denoise.diffusion.check_step(sigma, sigma_next)
        level, level_next = sigma.double(), sigma_next.double()
        spread = (log_variance(variance, level, level_next, level, channels) / 2).exp().to(x)
        return estimate + (sigma_next / sigma) ** 2 * (x - estimate) + spread * noise()


def posterior_step(
    x: Tensor,
    estimate: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eta: float,
    noise: SampleNoise,
    unclipped: Tensor | None = None,
) -> Tensor:
    """From sigma to sigma_next, given the estimate D of x0, and the one whose noise is kept if it is another."""
    ratio = sigma_next / sigma
    kept = ratio * (1 - eta**2 + (eta * ratio) ** 2).sqrt()  # sqrt(sigma_next^2 - eta^2 u^2) / sigma
    result = estimate + kept * (x - (estimate if unclipped is None else unclipped))
    return result if eta == 0 or sigma_next == 0 else result + eta * sigma_next * (1 - ratio**2).sqrt() * noise()
