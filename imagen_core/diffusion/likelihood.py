"""The variational bound on the likelihood of images, in bits per dimension.

Ho et al. 2020 (arXiv 2006.11239), equation 5 and section 3.3; Nichol and Dhariwal 2021 (arXiv 2102.09672). An image
costs the KL divergence of its last noise level from the prior, of each step's q(x_next | x, x0) from p(x_next | x),
and at the step without noise the negative log-likelihood of its 8-bit values. KL divergences do not depend on the
coordinate; here it is x = x0 + sigma n.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imagen_core.diffusion.denoiser import Denoiser, column
from imagen_core.diffusion.variance import Variance, log_variance
from imagen_core.models import Conditioning

_HALF_BIN = 1 / 255  # of 8-bit values as numbers in [-1, 1]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Row i belongs to image i; steps go from the lowest noise level up. All float64 on the CPU.

    Attributes:
        prior: (b,) bits per dimension: KL(q(x_T | x0) || N(0, 1)) in DDPM's coordinate.
        bound: (b, steps) bits per dimension: KL(q(x_next | x, x0) || p(x_next | x)); the first entry, of the step to
            the image itself, is -log2 p(x0 | x).
        x0_mse: (b, steps), mean squared error of the estimated image.
        noise_mse: (b, steps), mean squared error of the estimated noise (x - D) / sigma.
    """

    prior: Tensor
    bound: Tensor
    x0_mse: Tensor
    noise_mse: Tensor

    @property
    def total(self) -> Tensor:
        """(b,) bits per dimension; its mean over noise bounds the negative log-likelihood from above."""
        return self.prior + self.bound.sum(dim=1)


@torch.no_grad()
def bits_per_dimension(
    denoiser: Denoiser,
    x0: Tensor,
    conditioning: Conditioning,
    sigmas: Tensor,
    noise: Callable[[int], Tensor],
    *,
    clip: bool = True,
    on_step: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """The bound of each image, with one sample of noise per step and one network call per step.

    Args:
        x0: (b, c, h, w) in [-1, 1], 8-bit values / 127.5 - 1.
        sigmas: float64 (steps + 1,), falling to 0: a sampling grid, e.g. all steps of the model's schedule.
        noise: step 0, 1, ... from the lowest noise up -> (b, c, h, w), standard normal.
        clip: clip the estimated image to [-1, 1], as sampling would.
        on_step: called after each step as (steps done, number of steps).
    Raises:
        ValueError: fewer than two noise levels; or variance=learned and levels that are not the schedule's own steps.
    """
    rising = sigmas[:-1].flip(0).to(x0.device)
    if len(rising) < 2:
        raise ValueError(f"sigmas: the bound needs two noise levels or more (got {len(rising)})")
    settings, count = denoiser.config.diffusion, len(rising)
    terms, errors = [], []
    for step, sigma in enumerate(rising):
        sigma_next = rising[step - 1] if step else torch.zeros_like(sigma)
        settings.check_step(sigma, sigma_next)
        x = x0 + sigma.to(x0.dtype) * noise(step)
        estimate, channels = denoiser.with_variance(x, sigma.expand(len(x0)), conditioning)
        estimate = estimate.clamp(-1, 1) if clip else estimate
        levels = [level.reshape(1) for level in (sigma, sigma_next, rising[min(step + 1, count - 1)])]
        terms.append(bound_term(settings.variance, x0, estimate, channels, *levels).double())
        errors.append(((x0 - estimate) ** 2).flatten(1).mean(dim=1).double())
        if on_step is not None:
            on_step(step + 1, count)
    x0_mse = torch.stack(errors, dim=1)
    noise_mse = x0_mse / rising**2  # (x - D) / sigma - n is (x0 - D) / sigma
    return Likelihood(
        prior_term(x0, rising[-1]).double().cpu(), torch.stack(terms, dim=1).cpu(), x0_mse.cpu(), noise_mse.cpu()
    )


def prior_term(x0: Tensor, sigma: Tensor) -> Tensor:
    """KL of the images at the highest level from N(0, 1 + sigma^2), in DDPM's coordinate N(0, 1); (b,) bits per
    dimension."""
    ratio = float(sigma) ** 2 / (1 + float(sigma) ** 2)
    kl = (ratio - 1 - math.log(ratio) + x0.double() ** 2 * (1 - ratio)) / 2
    return kl.flatten(1).mean(dim=1) / math.log(2)


def bound_term(
    variance: Variance,
    x0: Tensor,
    estimate: Tensor,
    channels: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_above: Tensor,
) -> Tensor:
    """The term of the step from sigma to sigma_next, with D = `estimate`: (b,) bits per dimension.

    Args:
        x0, estimate: (b, c, h, w).
        channels: of a learned variance, (b, c, h, w); else None.
        sigma, sigma_next, sigma_above: float64 (b,) or (1,); see `log_variance`.
    """
    levels = column(sigma, x0), column(sigma_next, x0), column(sigma_above, x0)
    log_model = log_variance(variance, *levels, channels).to(x0.dtype)
    log_posterior = log_variance("fixed_small", *levels, None).to(x0.dtype)
    share = (1 - (levels[1] / levels[0]) ** 2).to(x0.dtype)  # of D in the mean; the rest of both means is x
    distance = share * (x0 - estimate)
    kl = (log_model - log_posterior - 1 + (log_posterior - log_model).exp() + distance**2 * (-log_model).exp()) / 2
    last = levels[1] == 0
    zero = torch.zeros_like(x0)  # for the other rows, whose gradient must be finite too
    mean, log_std = torch.where(last, estimate, x0), torch.where(last, log_model / 2, zero)
    likelihood = discretised_log_likelihood(x0, mean, log_std)
    nats = torch.where(last, -likelihood, kl)
    return nats.flatten(1).mean(dim=1) / math.log(2)


def discretised_log_likelihood(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Natural logarithm of the probability of each 8-bit value of x0, in [-1, 1], under N(mean, std^2).

    The lowest value gets all probability below it, the highest all above it (Ho et al. 2020, equation 13).
    """
    std = log_std.exp()
    deviation = (x0 - mean).abs()  # the normal distribution is symmetric, and its lower tail is exact
    upper = torch.special.log_ndtr((_HALF_BIN - deviation) / std)
    lower = torch.special.log_ndtr((-_HALF_BIN - deviation) / std)
    inside = upper + torch.log(-torch.expm1(lower - upper))
    lowest = torch.special.log_ndtr((x0 + _HALF_BIN - mean) / std)
    highest = torch.special.log_ndtr((mean - x0 + _HALF_BIN) / std)
    return torch.where(x0 < -1 + _HALF_BIN, lowest, torch.where(x0 > 1 - _HALF_BIN, highest, inside))
