"""Counts parameters without allocating them."""

import torch
from torch import nn

from imagen_core.models import UNetConfig


def build_on_meta(config: UNetConfig) -> nn.Module:
    """The model with shapes and no data."""
    with torch.device("meta"):
        return config.build()


def count_parameters(config: UNetConfig) -> int:
    """Exact number of parameters of the model a configuration builds."""
    return sum(parameter.numel() for parameter in build_on_meta(config).parameters())
