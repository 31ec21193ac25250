"""Weights of another system's network, brought into one of ours."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn


class _NetworkConfig(Protocol):
    def build(self) -> nn.Module: ...


def match_parameters(tensors: Iterable[tuple[str, str, Tensor]], config: _NetworkConfig) -> dict[str, Tensor]:
    """The parameters of `config.build()`, by name, in float32.

    Args:
        tensors: (name there, name here, values); axes of length 1 do not count, so a 1 x 1 convolution may become a
            linear layer.
    Raises:
        ValueError: a tensor is missing, not known, of another shape, or there twice with different values.
    """
    with torch.device("meta"):
        wanted = {name: parameter.shape for name, parameter in config.build().named_parameters()}
    found: dict[str, Tensor] = {}
    for theirs, mine, values in tensors:
        shape = wanted.get(mine)
        if shape is None or [n for n in values.shape if n > 1] != [n for n in shape if n > 1]:
            expected = "no such tensor" if shape is None else f"shape {tuple(shape)}"
            raise ValueError(f"{theirs} has shape {tuple(values.shape)}, these settings make {expected}")
        values = values.reshape(shape).float()
        if mine in found and not found[mine].equal(values):
            raise ValueError(f"{theirs} is there under two names with different values; the checkpoint is damaged")
        found[mine] = values
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, among them the one that is {missing[0]} here")
    return found
