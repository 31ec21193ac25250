"""Adapters in a network, by peft: layers that hold their base, A and B. peft is imported when one is added.

In checkpoints a layer's matrices are `LAYER.lora_A.weight` and `LAYER.lora_B.weight`, as in peft's own files: (rank,
in) and (out, rank) of a linear layer, (rank, in, kh, kw) and (out, rank, 1, 1) of a convolution.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imagen_core.train.errors import TrainError
from imagen_core.train.lora.config import LoraConfig

ATTENTION = ("to_q", "to_kv", "context_to_kv", "to_out")
"""Names of the projections of attention, of which a network has some."""
_KINDS = (nn.Linear, nn.Conv2d)  # and not their children, which may compute something else with their weights
_NAME = "default"  # of the adapter within peft's layers
MATRICES = (".lora_A.", ".lora_B.")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise TrainError("lora: needs peft; pip install '.[lora]' in the checkout, or pip install peft") from error
    return peft


def target_layers(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Names of the layers that an adapter is for, in the model's order.

    Args:
        targets: ends of their names; None means all projections of attention.
    Raises:
        TrainError: there is none, or it is no plain linear layer or convolution.
    """
    modules = {name: module for name, module in model.named_modules() if not isinstance(module, nn.Identity)}
    chosen: set[str] = set()
    for number, target in enumerate(ATTENTION if targets is None else targets):
        ends = {name for name in modules if name == target or name.endswith(f".{target}")}
        if targets is not None and not ends:
            raise TrainError(f"lora.targets.{number}: {target!r} ends the name of no layer; {_known(modules)}")
        for name in sorted(ends):
            if type(modules[name]) not in _KINDS:
                raise TrainError(
                    f"lora.targets.{number}: {target!r} ends {name}, which is a {type(modules[name]).__name__}, and "
                    f"LoRA is for linear layers and plain convolutions; {_known(modules)}"
                )
        chosen |= ends
    if not chosen:
        raise TrainError(f"lora.targets: the model has no attention; {_known(modules)}")
    return [name for name in modules if name in chosen]


def _known(modules: Mapping[str, nn.Module]) -> str:
    ends = sorted({name.rpartition(".")[2] for name, module in modules.items() if type(module) in _KINDS})
    named = [end for end in ends if not end.isdigit()]
    return f"name some of {', '.join(named)}, or more of a layer's name"


def add_new_adapter(model: nn.Module, config: LoraConfig) -> None:
    """`add_adapter` to the `target_layers` of a configuration.

    Raises:
        TrainError: there are none, or peft is not installed.
    """
    layers = target_layers(model, config.targets)
    add_adapter(model, layers, rank=config.rank, alpha=config.scale_times_rank)


def add_adapter(model: nn.Module, layers: Sequence[str], *, rank: int, alpha: float) -> None:
    """Gives these layers a new adapter, with which the model computes the same, and freezes all else.

    A is random (torch's generator), B is 0; both are of the layer's dtype and on its device.

    Raises:
        TrainError: peft is not installed.
    """
    peft = _peft()
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers))
    children = nn.ModuleDict(dict(model.named_children()))  # the model's `config` is not one that peft reads
    peft.inject_adapter_in_model(settings, children, _NAME)
    for layer in _adapted(model).values():
        layer.cast_input_dtype_enabled = False  # autocast decides the types


def has_adapter(model: nn.Module) -> bool:
    """Whether `add_adapter` changed the model, and it was not merged since."""
    return any(mark in name for name, _ in model.named_parameters() for mark in MATRICES)


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a training averages and saves, by its name in checkpoints: the adapter alone, if the model has one, and
    otherwise all parameters, also frozen ones."""
    named = dict(model.named_parameters())
    own = {name: p for name, p in named.items() if any(mark in name for mark in MATRICES)}
    return {name.replace(f".{_NAME}.", "."): p for name, p in own.items()} if own else named


def adapter_settings(model: nn.Module) -> tuple[int, float]:
    """Rank and alpha of the model's adapter."""
    layer = next(iter(_adapted(model).values()))
    return layer.r[_NAME], layer.lora_alpha[_NAME]


def adapter_layers(names: Iterable[str]) -> list[str]:
    """The layers that the tensors of an adapter are for, from the tensors' names."""
    return list(dict.fromkeys(name.partition(mark)[0] for name in names for mark in MATRICES if mark in name))


@torch.no_grad()
def load_adapter(model: nn.Module, tensors: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
    """Fills the model's adapter; `scale` is a factor of what it adds. Names and shapes must be those of the model."""
    for name, parameter in saved_parameters(model).items():
        parameter.copy_(tensors[name])
    for layer in _adapted(model).values():
        layer.set_scale(_NAME, scale)


def merge_adapter(model: nn.Module) -> None:
    """Adds the adapter to the weights, and leaves the model without it."""
    for name, layer in _adapted(model).items():
        layer.merge()
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, layer.get_base_layer())


def _adapted(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
