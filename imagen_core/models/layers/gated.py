"""Gated linear units."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

GatedActivation = Literal["geglu", "geglu_tanh", "swiglu"]


class Gated(nn.Module):
    """The first half of the features, times an activation of the other half (Shazeer 2020, arXiv 2002.05202).

    geglu: GELU; geglu_tanh: its approximation by a hyperbolic tangent; swiglu: SiLU.
    """

    def __init__(self, activation: GatedActivation):
        super().__init__()
        self.activation: GatedActivation = activation

    def forward(self, x: Tensor) -> Tensor:
        """float (..., 2 d) -> (..., d)."""
        value, gate = x.chunk(2, dim=-1)
        if self.activation == "swiglu":
            return value * F.silu(gate)
        return value * F.gelu(gate, approximate="tanh" if self.activation == "geglu_tanh" else "none")
