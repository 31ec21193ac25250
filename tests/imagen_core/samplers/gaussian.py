"""Gaussian images: their denoiser in closed form, and the exact law of what a sampler makes of it.

With this denoiser every step of every sampler is affine in the noise, so the law of the result is Gaussian and
its mean and variance follow exactly: run the sampler once with all noise 0 and once for each number set to 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from imagen_core.samplers import Sampler, sample


@dataclass
class Gaussian:
    """Every pixel is N(mean, std^2)."""

    mean: float = 0.5
    std: float = 0.4

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] for x = x0 + sigma n."""
        return (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)

    def flow(self, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The exact solution of dx/dsigma = (x - D)/sigma: the distance to the mean shrinks with the total std."""
        total, total_next = (self.std**2 + sigma**2).sqrt(), (self.std**2 + sigma_next**2).sqrt()
        return self.mean + (x - self.mean) * total_next / total


class UnitNoise:
    """Noise for `sample`: row 0 of the batch gets zeros, row k + 1 the k-th unit vector of all numbers sampled."""

    def __init__(self, rows: int):
        self._rows = rows
        self.sampled = 0

    def __len__(self) -> int:
        return self._rows

    def normal(self, shape: tuple[int, ...], device: object = None, dtype: torch.dtype = torch.float64) -> Tensor:
        size = int(torch.tensor(shape).prod())
        flat = torch.zeros(self._rows, size, dtype=dtype)
        for pixel in range(size):
            if self.sampled + pixel + 1 < self._rows:
                flat[self.sampled + pixel + 1, pixel] = 1
        self.sampled += size
        return flat.reshape(self._rows, *shape)


def law(sampler: Sampler, denoise, sigmas: Tensor, shape=(1, 1, 1), **options) -> tuple[Tensor, Tensor]:
    """Exact mean (pixels,) and covariance (pixels, pixels) of the sampler's images, for an affine denoiser."""
    counter = UnitNoise(1)
    sample(sampler, denoise, sigmas, counter, shape, dtype=torch.float64, **options)
    noise = UnitNoise(counter.sampled + 1)
    rows = sample(sampler, denoise, sigmas, noise, shape, dtype=torch.float64, **options).flatten(1)
    effects = rows[1:] - rows[:1]
    return rows[0], effects.T @ effects
