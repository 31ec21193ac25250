"""AdamW, fast where kernels of convolutions are channels-last."""

from typing import Any

import torch
from torch import Tensor


class DenseAdamW(torch.optim.AdamW):
    """AdamW that gives the fused kernel of CPUs the same numbers in the order of memory.

    That kernel copies what is not contiguous, at every step; a channels-last tensor is, with its axes permuted. And it
    takes a weight and its gradient by their places in memory, so gradients are put in the weight's order.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Fills the lists of parameters, gradients and moments, each with one tensor per parameter."""
        has_complex = super()._init_group(group, *lists)
        for n, (parameter, gradient) in enumerate(zip(*lists[:2], strict=True)):
            if gradient.stride() != parameter.stride():
                lists[1][n] = torch.empty_like(parameter).copy_(gradient)
        permuted = [n for n, parameter in enumerate(lists[0]) if _is_channels_last(parameter)]
        for tensors in lists[:-1]:  # the last one is of steps
            for n in permuted[: len(tensors)]:  # one list is empty: the maxima of amsgrad
                tensors[n] = tensors[n].permute(0, 2, 3, 1)
        return has_complex


def _is_channels_last(parameter: Tensor) -> bool:
    if parameter.device.type != "cpu" or parameter.ndim != 4 or parameter.is_contiguous():
        return False
    return parameter.is_contiguous(memory_format=torch.channels_last)
