"""Gated linear units."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class Gated(nn.Module):
    """The first half of the features, times an activation of the other half (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, activation: Literal["geglu", "swiglu"]):
        super().__init__()
        self.gelu = activation == "geglu"

    def forward(self, x: Tensor) -> Tensor:
        """float (..., 2 d) -> (..., d)."""
        value, gate = x.chunk(2, dim=-1)
        return value * (F.gelu(gate) if self.gelu else F.silu(gate))
