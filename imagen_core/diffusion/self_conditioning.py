"""Self-conditioning: a network reads an earlier estimate of the clean image (Chen et al. 2022, arXiv 2208.04202).

In training that is its own first estimate for some rows and zero for the others (section 3.2); in sampling, the
estimate of the previous step.
"""

from dataclasses import replace

import torch
from torch import Tensor

from imagen_core.diffusion.denoiser import Denoiser, column
from imagen_core.models import Conditioning


@torch.no_grad()
def with_own_estimate(
    denoiser: Denoiser, x0: Tensor, sigma: Tensor, noise: Tensor, conditioning: Conditioning, rows: Tensor
) -> Conditioning:
    """Adds the denoiser's estimate without self-conditioning, without a gradient.

    Args:
        x0, noise: (b, c, h, w).
        sigma: (b,), noise levels > 0.
        rows: bool (b,), the rows that get the estimate; the others get zero.
    """
    x = x0 + column(sigma.to(x0.dtype), x0) * noise
    estimate = denoiser(x, sigma, conditioning)
    torch.clear_autocast_cache()  # torch before 2.10 would reuse weights without gradients
    return replace(conditioning, estimate=torch.where(column(rows, x0), estimate, 0))
