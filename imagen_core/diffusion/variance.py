"""The variance of one step of the reverse process, p(x_next | x): fixed, or learned by the network.

Nichol and Dhariwal 2021 (arXiv 2102.09672), section 3.1. In the coordinate x = x0 + sigma n, going from sigma down to
sigma_next, the two fixed choices of Ho et al. 2020 (arXiv 2006.11239, section 3.2) are

    fixed_small  sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2               of q(x_next | x, x0); DDPM's beta tilde
    fixed_large  (1 + sigma_next^2) (sigma^2 - sigma_next^2) / (1 + sigma^2)   DDPM's beta

(DDPM's numbers times 1 + sigma_next^2, as x is 1 / alpha times DDPM's state). They hold for any two levels, so also
for a subset of a schedule's steps.
"""

from typing import Literal

import torch
from torch import Tensor

Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range", "learned_range_sigmoid"]


def is_learned(variance: Variance) -> bool:
    """Whether the second half of the network's channels gives the variance."""
    return variance.startswith("learned")


def log_variance(
    variance: Variance, sigma: Tensor, sigma_next: Tensor, sigma_above: Tensor, channels: Tensor | None
) -> Tensor:
    """Natural logarithm of the variance of p(x_next | x), in the coordinate x0 + sigma n.

    Where sigma_next is 0 the variance of q(x_next | x, x0) is 0 too; the variance of the previous step replaces it, as
    published: the discretised likelihood of the images needs it.

    Args:
        sigma, sigma_next: of one shape that broadcasts with `channels`; sigma_next may be 0.
        sigma_above: the next higher noise level than sigma; read only where sigma_next is 0.
        channels: (b, c, h, w), the network's output; None for fixed variances. For learned_range -1 is fixed_small, 1
            is fixed_large, and the logarithm is linear between them (equation 15 of the paper);
            learned_range_sigmoid takes the sigmoid for the share of fixed_large, so that it stays between the two;
            for learned it is the logarithm of DDPM's variance itself.
    """
    rescaled = torch.log1p(sigma_next**2)
    if variance == "learned":
        assert channels is not None
        return channels + rescaled.to(channels)
    last = sigma_next == 0
    high, low = torch.where(last, sigma_above, sigma), torch.where(last, sigma, sigma_next)
    smallest = low.log() * 2 + torch.log1p(-((low / high) ** 2)) - torch.where(last, torch.log1p(low**2), 0)
    if variance == "fixed_small":
        return smallest
    largest = rescaled + (sigma**2 - sigma_next**2).log() - torch.log1p(sigma**2)
    if variance == "fixed_large":
        return torch.where(last, smallest, largest)
    assert channels is not None
    share = channels.sigmoid() if variance == "learned_range_sigmoid" else (channels + 1) / 2
    return share * largest.to(channels) + (1 - share) * smallest.to(channels)
