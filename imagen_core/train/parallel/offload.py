"""AdamW whose moments are in main memory, and on the device only while they are updated."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from imagen_core.train.adamw import DenseAdamW
from imagen_core.train.parallel.world import local

_PART_NUMBERS = 2**26
"""Most values of the parameters that are updated together, unless a single one has more; their two moments take 512
MiB of the device."""


class OffloadedAdamW(DenseAdamW):
    """AdamW that computes where the weights are, part by part, and gives the same numbers as AdamW.

    The moments of a part are copied to the weights' device, updated there by the fused kernel, and copied back: 16
    bytes per parameter and step, over PCIe. Between steps the device holds none of them.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the weights; `closure` must be None."""
        if closure is not None:
            raise ValueError("closure: the gradients must be computed before the step")
        groups = self.param_groups
        try:
            for group in groups:
                for part in _parts([p for p in group["params"] if p.grad is not None]):
                    self.param_groups = [{**group, "params": part}]
                    self._update(part)
        finally:
            self.param_groups = groups
        if any(parameter.is_cuda for group in groups for parameter in group["params"][:1]):
            torch.cuda.synchronize()  # what reads the moments next may be no operation of the device

    def _update(self, part: Sequence[nn.Parameter]) -> None:
        kept = {parameter: self.state[parameter] for parameter in part}
        for parameter, moments in kept.items():
            self.state[parameter] = {name: _beside(values, parameter) for name, values in moments.items()}
        super().step()
        for parameter in part:
            self._offload(parameter, into=kept[parameter], non_blocking=True)

    def offload(self, parameter: nn.Parameter) -> None:
        """Moves a parameter's moments to main memory: this process's part of them, if they are sharded."""
        self._offload(parameter, into={}, non_blocking=False)

    def _offload(self, parameter: nn.Parameter, *, into: dict[str, Tensor], non_blocking: bool) -> None:
        for name, values in self.state[parameter].items():
            mine = local(values)
            if name not in into:
                into[name] = torch.empty_like(mine, device="cpu", pin_memory=mine.is_cuda)
            into[name].copy_(mine, non_blocking=non_blocking)
        self.state[parameter] = into


def _beside(values: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy on the parameter's device, sharded as the parameter if it is as large."""
    if values.ndim == 0:  # the number of steps
        return values.to(parameter.device, copy=True)
    copied = torch.empty_like(parameter)
    local(copied).copy_(values, non_blocking=True)
    return copied


def _parts(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in their order, in parts of bounded size."""
    part: list[nn.Parameter] = []
    for parameter in parameters:
        if part and sum(local(p).numel() for p in part) + local(parameter).numel() > _PART_NUMBERS:
            yield part
            part = []
        part.append(parameter)
    if part:
        yield part
