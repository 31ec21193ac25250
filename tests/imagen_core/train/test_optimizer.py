"""AdamW: the right groups, the published update, and a learning rate that is a function of the step."""

import copy
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from imagen_core.models.layers.attention import Attention
from imagen_core.train import OptimizerConfig, TrainError
from imagen_core.train.adamw import DenseAdamW
from imagen_core.train.optimizer import decay_start, learning_rate, make_optimizer
from imagen_core.train.parallel.muon import AnyOptimizer


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


def wsd(**changes: Any) -> OptimizerConfig:
    settings = {"lr": 2.0, "warmup_steps": 10, "schedule": "wsd", "decay_fraction": 0.25}
    return OptimizerConfig.model_validate(settings | changes)


def test_wsd_is_constant_until_its_last_part_and_then_linear() -> None:
    config = wsd(final_lr_fraction=0.1)
    rates = [learning_rate(config, step, 200) for step in (4, 10, 100, 150, 175, 200, 300)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0 * (0.1 + 0.9 * 0.5), 0.2, 0.2])
    assert decay_start(config, 200) == 150


def test_wsd_may_fall_by_one_minus_the_root() -> None:
    config = wsd(decay_shape="one_minus_sqrt")
    rates = [learning_rate(config, 150 + round(50 * part), 200) for part in (0.0, 0.04, 0.5, 1.0)]
    assert rates == pytest.approx([2.0 * (1 - math.sqrt(part)) for part in (0.0, 0.04, 0.5, 1.0)])
    assert learning_rate(config, 175, 200) < learning_rate(wsd(), 175, 200)


def test_the_decay_of_wsd_ends_at_decay_steps_and_never_begins_in_the_warmup() -> None:
    assert decay_start(wsd(decay_steps=100), 1000) == 75
    assert learning_rate(wsd(decay_steps=100), 100, 1000) == pytest.approx(0, abs=1e-12)
    early = wsd(warmup_steps=90, decay_steps=100, decay_fraction=0.5)
    assert learning_rate(early, 89, 100) == 2.0
    assert learning_rate(early, 95, 100) == pytest.approx(1.0)


def test_other_schedules_have_no_decay_to_begin() -> None:
    assert decay_start(OptimizerConfig(schedule="cosine"), 100) is None
    assert decay_start(OptimizerConfig(), 100) is None


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert learning_rate(OptimizerConfig(lr=0.3, warmup_steps=0), 0, 10) == 0.3


def test_biases_and_norms_are_not_decayed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Flatten(), nn.Linear(8, 2))
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {"0.weight", "3.weight"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_gains_of_queries_and_keys_are_those_of_norms() -> None:
    attention = Attention(16, kind="self", num_heads=2, head_dim=8, qk_norm=True)
    optimizer = make_optimizer(attention, OptimizerConfig(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert attention.qk_gains is not None
    assert id(attention.qk_gains) not in decayed
    assert id(attention.to_q.weight) in decayed


def grouped(*groups: dict[str, Any]) -> tuple[nn.Module, AnyOptimizer]:
    model = nn.ModuleDict({"text": nn.Linear(3, 4), "unet": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))})
    config = OptimizerConfig.model_validate({"lr": 0.1, "weight_decay": 0.5, "groups": groups})
    return model, make_optimizer(model, config)


def settings_of(model: nn.Module, optimizer: AnyOptimizer) -> dict[str, tuple[float, float]]:
    """Learning rate as a multiple, and weight decay, of each parameter."""
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters()}


def test_groups_have_their_own_learning_rate_and_decay() -> None:
    text = {"match": "text", "lr": 0.02}
    assert settings_of(*grouped(text, {"match": r"unet\.\d+\.weight", "weight_decay": 0.25})) == {
        "text.weight": (pytest.approx(0.2), 0.5),
        "text.bias": (pytest.approx(0.2), 0.0),
        "unet.0.weight": (1.0, 0.25),
        "unet.0.bias": (1.0, 0.0),
        "unet.1.weight": (1.0, 0.0),
        "unet.1.bias": (1.0, 0.0),
    }


def test_the_first_group_that_fits_has_the_parameter() -> None:
    settings = settings_of(*grouped({"match": "unet.0", "lr": 0.2}, {"match": "unet", "lr": 0.3}))
    assert (settings["unet.0.weight"][0], settings["unet.1.weight"][0]) == (pytest.approx(2), pytest.approx(3))


@pytest.mark.parametrize("groups", [({"match": "nett"},), ({"match": "unet"}, {"match": "unet.0"})], ids=len)
def test_a_group_without_parameters_is_refused_by_name(groups: tuple[dict[str, Any], ...]) -> None:
    last = len(groups) - 1
    words = rf"optimizer\.groups\.{last}\.match: '{groups[last]['match']}'.*names are like text.weight and unet.1.bias"
    with pytest.raises(TrainError, match=words):
        grouped(*groups)


def test_what_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(ValidationError, match="is no regular expression"):
        OptimizerConfig.model_validate({"groups": [{"match": "unet.("}]})


def test_every_group_is_updated_by_the_fused_kernel() -> None:
    _, optimizer = grouped({"match": "text", "lr": 0.02})
    assert [group["fused"] for group in optimizer.param_groups] == [True] * 4


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


def test_channels_last_kernels_are_updated_as_any_and_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, contiguous = torch._fused_adamw_, []

    def watched(*lists: list[torch.Tensor], **options: Any) -> None:
        contiguous.append(all(tensor.is_contiguous() for tensors in lists for tensor in tensors))
        fused(*lists, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", watched)
    plain = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 1), nn.ConvTranspose2d(4, 4, 4))
    ordered = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = OptimizerConfig(lr=0.1, weight_decay=0.1)
    optimizers = [make_optimizer(model, config) for model in (plain, ordered)]
    for _ in range(3):
        for p, q in zip(plain.parameters(), ordered.parameters(), strict=True):
            p.grad, q.grad = torch.randn_like(p), torch.empty_like(q)
            q.grad.copy_(p.grad)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(plain.parameters(), ordered.parameters(), strict=True):
        torch.testing.assert_close(q, p)
        assert optimizers[1].state[q]["exp_avg"].stride() == q.stride()  # as checkpoints restore them
    assert contiguous
    assert all(contiguous)


@pytest.mark.parametrize("weight_order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradient_order", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_belongs_to_its_weight_in_whatever_order_both_lie_in_memory(
    weight_order: torch.memory_format, gradient_order: torch.memory_format
) -> None:
    start, gradient = (torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = []
    for kind, orders in ((DenseAdamW, (weight_order, gradient_order)), (torch.optim.AdamW, ())):
        weight = nn.Parameter(start.clone(memory_format=orders[0]) if orders else start.clone())
        optimizer = kind([weight], lr=0.1, fused=bool(orders))
        for factor in (1.0, -0.5):
            weight.grad = factor * (gradient.contiguous(memory_format=orders[1]) if orders else gradient)
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found)
