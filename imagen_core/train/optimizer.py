"""AdamW, Muon, and their learning rate."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from imagen_core.train.adamw import DenseAdamW
from imagen_core.train.components import OptimizerConfig
from imagen_core.train.errors import TrainError
from imagen_core.train.lora.adapter import saved_parameters
from imagen_core.train.parallel.muon import AnyOptimizer, GatheredMuon, MuonWithAdamW, hidden_matrices
from imagen_core.train.parallel.offload import OffloadedAdamW
from imagen_core.train.parallel.wrap import BLOCKS


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, further: Mapping[str, nn.Parameter] | None = None
) -> AnyOptimizer:
    """AdamW over all parameters, or those of the adapter; or Muon over the matrices of hidden layers and AdamW over
    the others. Biases and the gains of norms are not decayed.

    A group's `lr_scale` is its learning rate as a multiple of the configuration's.

    Args:
        further: parameters by name that are trained with the model, by AdamW unless a group says otherwise.
    Raises:
        TrainError: a group of the configuration has no parameters, or Muon has no matrix.
    """
    for_adamw, for_muon = _assigned(model, config, further or {})
    if not for_muon:
        kind = OffloadedAdamW if config.on_cpu else DenseAdamW
        return kind(for_adamw, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    muon = GatheredMuon(
        for_muon, lr=config.lr, momentum=config.muon.momentum, adjust_lr_fn=config.muon.adjust_lr, nesterov=True
    )
    adamw = DenseAdamW(for_adamw, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    return MuonWithAdamW(muon, adamw)


def num_muon_parameters(model: nn.Module, config: OptimizerConfig) -> int:
    """Number of values that Muon updates.

    Raises:
        TrainError: as `make_optimizer`.
    """
    return sum(p.numel() for group in _assigned(model, config, {})[1] for p in group["params"])


def _assigned(
    model: nn.Module, config: OptimizerConfig, further: Mapping[str, nn.Parameter]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups of parameters of AdamW, and of Muon."""
    named = [(name, p) for name, p in {**saved_parameters(model), **further}.items() if p.requires_grad]
    left: dict[str, nn.Parameter] = dict(named)
    layers = (nn.Linear, nn.Conv2d) if config.muon.kernels else (nn.Linear,)
    hidden = {id(p) for p in hidden_matrices(model, BLOCKS, layers)} if config.kind == "muon" else set[int]()
    for_adamw: list[dict[str, Any]] = []
    for_muon: list[dict[str, Any]] = []
    for number, group in enumerate(config.groups):
        taken = {name: p for name, p in left.items() if re.match(group.match, name)}
        if not taken:
            raise TrainError(
                f"optimizer.groups.{number}.match: {group.match!r} matches the beginning of no parameter's name that "
                f"is not in an earlier group; names are like {named[0][0]} and {named[-1][0]}"
            )
        left = {name: p for name, p in left.items() if name not in taken}
        matrices = {name: p for name, p in taken.items() if _is_muons(name, p, group.optimizer, hidden)}
        if group.optimizer == "muon" and not matrices:
            raise TrainError(
                f"optimizer.groups.{number}.optimizer: muon is for matrices, and {group.match!r} matches none; leave "
                "it out"
            )
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        scale = (config.lr if group.lr is None else group.lr) / config.lr
        for_muon += _muon_group(matrices, decay, scale)
        for_adamw += _split({name: p for name, p in taken.items() if name not in matrices}, decay, scale)
    matrices = {name: p for name, p in left.items() if _is_muons(name, p, None, hidden)}
    for_muon = _muon_group(matrices, config.weight_decay, 1.0) + for_muon
    others = {name: p for name, p in left.items() if name not in matrices}
    for_adamw = _split(others, config.weight_decay, 1.0) + for_adamw
    if config.kind == "muon" and not for_muon:
        raise TrainError(
            "optimizer.kind: muon is for the matrices of linear layers in blocks, and the model has none; use adamw, "
            "or name matrices in a group with optimizer=muon"
        )
    return for_adamw, for_muon


def _is_muons(name: str, parameter: nn.Parameter, chosen: str | None, hidden: set[int]) -> bool:
    if chosen == "muon":
        return parameter.ndim in (2, 4) and _is_decayed(name, parameter)
    return chosen is None and id(parameter) in hidden


def _muon_group(parameters: dict[str, nn.Parameter], weight_decay: float, lr_scale: float) -> list[dict[str, Any]]:
    group = {"params": list(parameters.values()), "weight_decay": weight_decay, "lr_scale": lr_scale}
    return [group] if parameters else []


def _split(parameters: dict[str, nn.Parameter], weight_decay: float, lr_scale: float) -> list[dict[str, Any]]:
    decayed = [p for name, p in parameters.items() if _is_decayed(name, p)]
    others = [p for name, p in parameters.items() if not _is_decayed(name, p)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": lr_scale},
        {"params": others, "weight_decay": 0.0, "lr_scale": lr_scale},
    ]
    return [group for group in groups if group["params"]]


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Two norms of attention have their gains in one tensor, which is not decayed."""
    return parameter.ndim > 1 and not name.endswith("qk_gains")


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of step 0, 1, 2 ...: linear warm-up, then as the schedule says, down to its final fraction."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    end = config.decay_steps or num_steps
    start = max(config.warmup_steps, decay_start(config, num_steps) or 0)
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        left = 1 - (progress if config.decay_shape == "linear" else math.sqrt(progress))
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * left)


def decay_start(config: OptimizerConfig, num_steps: int) -> int | None:
    """The number of steps before the decay of a wsd schedule; None for other schedules."""
    if config.schedule != "wsd":
        return None
    end = config.decay_steps or num_steps
    return end - max(1, round(config.decay_fraction * end))
