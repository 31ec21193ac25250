"""Embeddings of the noise level."""

import math

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    """Cosines and sines of geometrically spaced frequencies 1 ... 1/10000 (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, dim: int):
        super().__init__()
        if dim % 2:
            raise ValueError(f"a sinusoidal embedding needs an even width (got {dim})")
        self.out_dim = dim

    def forward(self, values: Tensor) -> Tensor:
        """float (b,) -> (b, dim)."""
        half = self.out_dim // 2
        exponents = torch.arange(half, device=values.device, dtype=torch.float32) / half
        angles = values[:, None] * torch.exp(-math.log(10_000) * exponents).to(values.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class LearnedFourierEmbedding(nn.Module):
    """The value itself, then sines and cosines of learned frequencies: 2 * num_frequencies + 1 wide."""

    def __init__(self, num_frequencies: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_frequencies))
        self.out_dim = 2 * num_frequencies + 1

    def forward(self, values: Tensor) -> Tensor:
        """float (b,) -> (b, out_dim)."""
        angles = values[:, None] * self.weight.to(values.dtype) * (2 * math.pi)
        return torch.cat([values[:, None], angles.sin(), angles.cos()], dim=-1)


def embedding_mlp(embedding: SinusoidalEmbedding | LearnedFourierEmbedding, time_dim: int) -> nn.Sequential:
    """Noise level (b,) -> time vector (b, time_dim) through two linear layers."""
    return nn.Sequential(embedding, nn.Linear(embedding.out_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
