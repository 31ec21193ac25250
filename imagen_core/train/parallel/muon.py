"""Muon for the matrices of a network's hidden layers, and AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from imagen_core.train.parallel.world import like, local, unsharded

MOMENTUM = "momentum_buffer"
"""Muon's state of a parameter."""


class GatheredMuon(torch.optim.Muon):
    """torch's Muon, which orthogonalises whole matrices also where the parameters are sharded, and kernels of
    convolutions as matrices of outputs x (pixels and inputs).

    Each process gathers one sharded matrix after the other, with its gradient and momentum, and does the same update
    as every other process, as one process would: torch's own update of sharded matrices sums products of bfloat16 in
    another order.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any):
        """As torch's, but that parameters of four axes are allowed."""
        super().__init__([{**group, "params": []} for group in groups], **settings)
        for ours, group in zip(self.param_groups, groups, strict=True):
            ours["params"] = list(group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Updates the weights; `closure` must be None."""
        if closure is not None:
            raise ValueError("closure: the gradients must be computed before the step")
        groups = self.param_groups
        try:
            for group in groups:
                plain = [p for p in group["params"] if p.ndim == 2 and not isinstance(p, DTensor)]
                self.param_groups = [{**group, "params": plain}]
                super().step()
                others = {id(p) for p in plain}
                for parameter in group["params"]:
                    if id(parameter) not in others and parameter.grad is not None:
                        self._update_as_matrix(group, parameter, parameter.grad)
        finally:
            self.param_groups = groups

    def _update_as_matrix(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        shape = parameter.shape
        matrix = nn.Parameter(_matrix(unsharded(parameter.detach())).clone(), requires_grad=False)
        matrix.grad = _matrix(unsharded(gradient))
        if kept := self.state.get(parameter):
            self.state[matrix] = {MOMENTUM: _matrix(unsharded(kept[MOMENTUM]))}
        self.param_groups = [{**group, "params": [matrix]}]
        super().step()
        local(parameter).copy_(local(like(_kernel(matrix.detach(), shape), parameter)))
        self.state[parameter] = {MOMENTUM: like(_kernel(self.state.pop(matrix)[MOMENTUM], shape), parameter)}


def _matrix(tensor: Tensor) -> Tensor:
    """(outputs, inputs, h, w) -> (outputs, h w inputs), which is no copy where kernels are channels-last."""
    return tensor if tensor.ndim == 2 else tensor.permute(0, 2, 3, 1).flatten(1)


def _kernel(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_matrix`."""
    if len(shape) == 2:
        return matrix
    outputs, inputs, height, width = shape
    return matrix.view(outputs, height, width, inputs).permute(0, 3, 1, 2)


class MuonWithAdamW:
    """Two optimizers with the interface of one; their state is one mapping by parameter."""

    def __init__(self, muon: GatheredMuon, adamw: torch.optim.AdamW):
        self._muon, self._adamw = muon, adamw
        self.state = muon.state = adamw.state
        self.matrices = frozenset(id(p) for group in muon.param_groups for p in group["params"])
        """Identities of the parameters that Muon has."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of AdamW, then those of Muon."""
        return [*self._adamw.param_groups, *self._muon.param_groups]

    def step(self) -> None:
        """Updates the weights by their gradients."""
        self._adamw.step()
        self._muon.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Removes the gradients."""
        self._adamw.zero_grad(set_to_none=set_to_none)
        self._muon.zero_grad(set_to_none=set_to_none)


AnyOptimizer = torch.optim.AdamW | MuonWithAdamW


def moment_names(optimizer: AnyOptimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """The tensors that the optimizer keeps of a parameter."""
    is_muons = isinstance(optimizer, MuonWithAdamW) and id(parameter) in optimizer.matrices
    return (MOMENTUM,) if is_muons else ("exp_avg", "exp_avg_sq", "step")


def hidden_matrices(
    model: nn.Module, blocks: tuple[type[nn.Module], ...], layers: tuple[type[nn.Module], ...]
) -> Iterator[Tensor]:
    """The weights of layers of these types within a network's repeated blocks."""
    seen: set[int] = set()
    for block in model.modules():
        if isinstance(block, blocks):
            for layer in block.modules():
                if isinstance(layer, layers) and id(layer.weight) not in seen:
                    assert isinstance(layer.weight, Tensor)
                    seen.add(id(layer.weight))
                    yield layer.weight
