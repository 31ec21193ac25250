"""AdamW: the right groups, the published update, and a learning rate that is a function of the step."""

import math

import pytest
import torch
from torch import nn

from imagen_core.train import OptimizerConfig
from imagen_core.train.optimizer import learning_rate, make_optimizer


def test_warmup_is_linear_and_constant_stays() -> None:
    config = OptimizerConfig(lr=0.5, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in (0, 1, 2, 3, 4, 50, 10**6)] == [
        0.125,
        0.25,
        0.375,
        0.5,
        0.5,
        0.5,
        0.5,
    ]


def test_cosine_decays_to_its_final_fraction() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=10, schedule="cosine", final_lr_fraction=0.1)
    assert learning_rate(config, 10, 110) == 2.0
    assert learning_rate(config, 60, 110) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert learning_rate(config, 85, 110) == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(0.75 * math.pi))))
    assert learning_rate(config, 110, 110) == pytest.approx(0.2)
    assert learning_rate(config, 500, 110) == pytest.approx(0.2)


def test_cosine_ends_at_decay_steps_if_given() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=0, schedule="cosine", decay_steps=50)
    assert learning_rate(config, 25, 1000) == pytest.approx(0.5)
    assert learning_rate(config, 50, 1000) == pytest.approx(0, abs=1e-12)


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert learning_rate(OptimizerConfig(lr=0.3, warmup_steps=0), 0, 10) == 0.3


def test_biases_and_norms_are_not_decayed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Flatten(), nn.Linear(8, 2))
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {"0.weight", "3.weight"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_the_update_is_adamws() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    model = nn.Linear(3, 2, dtype=torch.float64)
    config = OptimizerConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    optimizer = make_optimizer(model, config)
    weight, mean, square = model.weight.detach().clone(), 0.0, 0.0
    for step in range(1, 4):
        gradient = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros(2, dtype=torch.float64)
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        update = (mean / (1 - 0.8**step)) / ((square / (1 - 0.9**step)).sqrt() + 1e-6)
        weight = weight - 0.01 * (update + 0.1 * weight)
        torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-10, atol=1e-12)
