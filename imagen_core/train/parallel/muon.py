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
    """torch's Muon, which orthogonalises whole matrices also where the parameters are sharded.

    Each process gathers one matrix after the other, with its gradient and momentum, and does the same update as every
    other process, as one process would: torch's own update of sharded matrices sums products of bfloat16 in another
    order.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Updates the weights; `closure` must be None."""
        if closure is not None:
            raise ValueError("closure: the gradients must be computed before the step")
        groups = self.param_groups
        try:
            for group in groups:
                sharded = [p for p in group["params"] if isinstance(p, DTensor)]
                whole = [p for p in group["params"] if not isinstance(p, DTensor)]
                self.param_groups = [{**group, "params": whole}]
                super().step()
                for parameter in sharded:
                    if parameter.grad is not None:
                        self._update_sharded(group, parameter, parameter.grad)
        finally:
            self.param_groups = groups

    def _update_sharded(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        whole = nn.Parameter(unsharded(parameter.detach()), requires_grad=False)
        whole.grad = unsharded(gradient)
        if kept := self.state.get(parameter):
            self.state[whole] = {MOMENTUM: unsharded(kept[MOMENTUM])}
        self.param_groups = [{**group, "params": [whole]}]
        super().step()
        local(parameter).copy_(local(like(whole.detach(), parameter)))
        self.state[parameter] = {MOMENTUM: like(self.state.pop(whole)[MOMENTUM], parameter)}


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


def hidden_matrices(model: nn.Module, blocks: tuple[type[nn.Module], ...]) -> Iterator[Tensor]:
    """The weights of linear layers within a network's repeated blocks."""
    seen: set[int] = set()
    for block in model.modules():
        if isinstance(block, blocks):
            for layer in block.modules():
                if isinstance(layer, nn.Linear) and id(layer.weight) not in seen:
                    seen.add(id(layer.weight))
                    yield layer.weight
