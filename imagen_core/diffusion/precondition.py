"""What the network predicts, as one table.

With x = x0 + sigma * n the denoiser is D(x) = c_skip * x + c_out * F(c_in * x). Every objective is a choice of
the three coefficients (Karras et al. 2022, arXiv 2206.00364, equation 7 and table 1). c_in = 1/sqrt(1 + sigma^2)
feeds the network the variance-preserving state that DDPM would; with a flow schedule, whose noise has the scale s,
c_in = 1 - t = s/(s + sigma) feeds it x_t = (1 - t) x0 + t s n. edm has a c_in that depends on neither:
1/sqrt(sigma^2 + sd^2).

objective  F predicts                       c_skip                       c_out
eps        the noise n                      1                            -sigma
x0         the image                        0                            1
v          alpha n - sigma alpha x0         1/(1 + sigma^2)              -sigma/sqrt(1 + sigma^2)
edm        (x0 - c_skip x)/c_out            sd^2/(sigma^2 + sd^2)        sigma sd/sqrt(sigma^2 + sd^2)
prev       DDPM's previous state            -r^2/(1 - r^2)               sqrt(1 + sigma_prev^2)/(1 - r^2)
velocity   s n - x0, dx_t/dt of a flow      1 - t                        -t

prev predicts the mean of q(x_prev | x, x0) in DDPM's coordinate (Ho et al. 2020, arXiv 2006.11239, section 3.2); its
r is sigma_prev / sigma, so it exists in discrete schedules only.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Objective = Literal["eps", "x0", "v", "edm", "prev", "velocity"]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Each has the shape and dtype of the sigma it was made for."""

    skip: Tensor
    out: Tensor
    input: Tensor


def coefficients(
    objective: Objective,
    sigma: Tensor,
    sigma_data: float = 0.5,
    sigma_prev: Tensor | None = None,
    noise_scale: float | None = None,
) -> Coefficients:
    """The row of the table for `objective` at noise levels sigma > 0.

    Args:
        sigma_prev: the level before, which may be 0; `prev` alone reads it.
        noise_scale: s of a flow schedule; None for the others. `velocity` needs it.
    """
    if objective == "edm":
        total = (sigma**2 + sigma_data**2).sqrt()
        return Coefficients(sigma_data**2 / total**2, sigma * sigma_data / total, 1 / total)
    alpha = 1 / (1 + sigma**2).sqrt() if noise_scale is None else noise_scale / (noise_scale + sigma)
    if objective == "eps":
        return Coefficients(torch.ones_like(sigma), -sigma, alpha)
    if objective == "x0":
        return Coefficients(torch.zeros_like(sigma), torch.ones_like(sigma), alpha)
    if objective == "prev":
        assert sigma_prev is not None
        share = 1 - (sigma_prev / sigma) ** 2
        return Coefficients(1 - 1 / share, (1 + sigma_prev**2).sqrt() / share, alpha)
    if objective == "velocity":
        assert noise_scale is not None
        return Coefficients(alpha, -sigma / (noise_scale + sigma), alpha)
    return Coefficients(alpha**2, -sigma * alpha, alpha)
