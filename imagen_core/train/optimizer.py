"""AdamW and its learning rate."""

import math

import torch
from torch import nn

from imagen_core.train.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; one-dimensional ones (biases, norms) are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


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
