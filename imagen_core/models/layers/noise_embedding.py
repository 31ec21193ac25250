"""Embeddings of the noise level."""

import math

import torch
from torch import Tensor, nn

from imagen_core.models.layers.activation import Activation, activate


class SinusoidalEmbedding(nn.Module):
    """Cosines and sines of geometrically spaced frequencies 1 ... 1/10000 (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, dim: int, *, closed: bool = False):
        """
        Args:
            closed: the last frequency is 1/10000; otherwise the series ends one step before it.
        Raises:
            ValueError: dim is odd.
        """
        super().__init__()
        if dim % 2:
            raise ValueError(f"a sinusoidal embedding needs an even width (got {dim})")
        self.out_dim, self.closed = dim, closed

    def forward(self, values: Tensor) -> Tensor:
        """float (b,) -> (b, dim), float32 or better."""
        values, half = _exact(values), self.out_dim // 2
        exponents = torch.arange(half, device=values.device, dtype=values.dtype) / (half - self.closed)
        angles = values[:, None] * torch.exp(-math.log(10_000) * exponents)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class LearnedFourierEmbedding(nn.Module):
    """The value itself, then sines and cosines of learned frequencies: 2 * num_frequencies + 1 wide."""

    def __init__(self, num_frequencies: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_frequencies))
        self.out_dim = 2 * num_frequencies + 1

    def forward(self, values: Tensor) -> Tensor:
        """float (b,) -> (b, out_dim), float32 or better."""
        values = _exact(values)
        angles = values[:, None] * self.weight.to(values.dtype) * (2 * math.pi)
        return torch.cat([values[:, None], angles.sin(), angles.cos()], dim=-1)


def level_embedding(
    width: int, num_frequencies: int | None, *, closed: bool = False
) -> SinusoidalEmbedding | LearnedFourierEmbedding:
    """A sinusoidal embedding of this width, or a learned one if num_frequencies is given."""
    if num_frequencies is None:
        return SinusoidalEmbedding(width, closed=closed)
    return LearnedFourierEmbedding(num_frequencies)


def _exact(values: Tensor) -> Tensor:
    """At least float32, whatever the model's precision: bfloat16 cannot distinguish step 999 from step 1000."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class NoiseEmbedding(nn.Module):
    """Noise level -> time vector, by two linear layers on its embedding.

    The noise level may be a step index, ln(sigma)/4 or a log-SNR.
    """

    def __init__(
        self,
        embedding: SinusoidalEmbedding | LearnedFourierEmbedding,
        time_dim: int,
        activation: Activation = "silu",
    ):
        super().__init__()
        self.embedding = embedding
        self.activation: Activation = activation
        self.hidden = nn.Linear(embedding.out_dim, time_dim)
        self.out = nn.Linear(time_dim, time_dim)

    def forward(self, c_noise: Tensor) -> Tensor:
        """float (b,) -> (b, time_dim)."""
        embedded = self.embedding(c_noise).to(self.hidden.weight.dtype)
        return self.out(activate(self.hidden(embedded), self.activation))
