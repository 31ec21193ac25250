"""The activations of UNets."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu"]

_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


def activate(x: Tensor, kind: Activation) -> Tensor:
    """Applies SiLU, or GELU in its exact form; any shape."""
    return _FUNCTIONS[kind](x)
