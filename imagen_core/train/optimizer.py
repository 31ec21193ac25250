"""AdamW and its learning rate."""

import math
import re
from typing import Any

import torch
from torch import nn

from imagen_core.train.adamw import DenseAdamW
from imagen_core.train.components import OptimizerConfig
from imagen_core.train.errors import TrainError
from imagen_core.train.lora.adapter import saved_parameters
from imagen_core.train.parallel.offload import OffloadedAdamW


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters, or those of the adapter; biases and the gains of norms are not decayed.

    A group's `lr_scale` is its learning rate as a multiple of the configuration's.

    Raises:
        TrainError: a group of the configuration has no parameters.
    """
    named = [(name, p) for name, p in saved_parameters(model).items() if p.requires_grad]
    left: dict[str, nn.Parameter] = dict(named)
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(config.groups):
        taken = {name: p for name, p in left.items() if re.match(group.match, name)}
        if not taken:
            raise TrainError(
                f"optimizer.groups.{number}.match: {group.match!r} matches the beginning of no parameter's name that "
                f"is not in an earlier group; names are like {named[0][0]} and {named[-1][0]}"
            )
        left = {name: p for name, p in left.items() if name not in taken}
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        groups += _split(taken, decay, (config.lr if group.lr is None else group.lr) / config.lr)
    groups = _split(left, config.weight_decay, 1.0) + groups
    kind = OffloadedAdamW if config.on_cpu else DenseAdamW
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


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
    """Learning rate of step 0, 1, 2 ...: linear warm-up, then constant or half a cosine down to its final fraction."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    end = config.decay_steps or num_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    fraction = config.final_lr_fraction
    return config.lr * (fraction + (1 - fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
