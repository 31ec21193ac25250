"""Weights of another system's network, matched to the parameters of a network here."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn


class _NetworkConfig(Protocol):
    def build(self) -> nn.Module: ...


def match_parameters(tensors: Iterable[tuple[str, str, Tensor]], config: _NetworkConfig) -> dict[str, Tensor]:
    """The parameters of `config.build()`, by name, in float32.

    Args:
        tensors: (name in the other system, name here, values); axes of length 1 do not count, so a 1 x 1 convolution
            may become a linear layer.
        config: of the network that takes the weights.
    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or occurs twice with different values.
    """
    with torch.device("meta"):
        wanted = {name: parameter.shape for name, parameter in config.build().named_parameters()}
    found: dict[str, Tensor] = {}
    for source, name, values in tensors:
        shape = wanted.get(name)
        if shape is None or [n for n in values.shape if n > 1] != [n for n in shape if n > 1]:
            expected = "no such tensor" if shape is None else f"shape {tuple(shape)}"
            raise ValueError(f"{source} has shape {tuple(values.shape)}, these settings make {expected}")
        values = values.reshape(shape).float()
        if name in found and not found[name].equal(values):
            raise ValueError(f"{source} occurs under two names with different values; the checkpoint is damaged")
        found[name] = values
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, among them the one named {missing[0]} here")
    return found
