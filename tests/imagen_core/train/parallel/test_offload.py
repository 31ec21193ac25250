"""Adam's moments in main memory: the same training, with less on the device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagen_core.train import OptimizerConfig, train
from imagen_core.train.memory import estimate_memory
from imagen_core.train.optimizer import make_optimizer
from imagen_core.train.parallel import offload
from tests.imagen_core.train.small import BASE, make_config, tensors

FAST: dict[str, Any] = {"lr": 1e-2, "warmup_steps": 2, "weight_decay": 0.1}
ON_CPU = FAST | {"on_cpu": True}


def model(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 4, 3))
    return layers.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def trained(settings: dict[str, Any], device: str = "cpu") -> tuple[nn.Sequential, torch.optim.AdamW]:
    """After three steps, the second without a gradient of one layer."""
    net = model(device)
    optimizer = make_optimizer(net, OptimizerConfig(**settings))
    for step in range(3):
        torch.manual_seed(step)
        net(torch.randn(2, 3, 8, 8).to(device)).square().mean().backward()
        if step == 1:
            net[1].weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def moments(net: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    return {
        f"{name} {moment}": values
        for name, parameter in net.named_parameters()
        for moment, values in optimizer.state[parameter].items()
    }


@pytest.mark.parametrize("most", [1, 250, 10**6], ids=["one by one", "some parts", "one part"])
def test_weights_and_moments_are_exactly_adamws_in_parts_of_any_size(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_PART_NUMBERS", most)
    (net, optimizer), (plain, reference) = trained(ON_CPU), trained(FAST)
    assert isinstance(optimizer, offload.OffloadedAdamW)
    for name, values in plain.named_parameters():
        assert net.get_parameter(name).equal(values), name
    expected = moments(plain, reference)
    assert all(values.equal(expected.pop(name)) for name, values in moments(net, optimizer).items())
    assert not expected


def test_parts_hold_no_more_than_allowed_and_every_parameter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_PART_NUMBERS", 20)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (15, 5, 1, 50, 3)]
    parts = list(offload._parts(parameters))
    assert [[p.numel() for p in part] for part in parts] == [[15, 5], [1], [50], [3]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moments_of_weights_on_a_gpu_are_in_main_memory_and_exactly_adamws() -> None:
    (net, optimizer), (plain, reference) = trained(ON_CPU, "cuda"), trained(FAST, "cuda")
    assert {values.device.type for values in moments(net, optimizer).values()} == {"cpu"}
    expected = moments(plain, reference)
    for name, values in moments(net, optimizer).items():
        assert values.equal(expected[name].cpu()), name
    for name, values in plain.named_parameters():
        assert net.get_parameter(name).equal(values), name


@pytest.mark.slow
def test_a_training_may_resume_with_moments_in_main_memory_and_without(store: Path, tmp_path: Path) -> None:
    """Every tensor of the checkpoint, the moments included, is that of a training without the option."""
    straight = train(make_config(store, num_steps=6, optimizer=FAST), tmp_path / "a")
    for steps, settings in ((2, FAST), (4, ON_CPU), (6, FAST)):
        mixed = train(make_config(store, num_steps=steps, optimizer=settings), tmp_path / "b")
    expected, found = tensors(Path(straight["checkpoint"])), tensors(Path(mixed["checkpoint"]))
    assert found.keys() == expected.keys()
    assert all(values.equal(expected[name]) for name, values in found.items())


def test_the_estimate_counts_no_moments_in_main_memory() -> None:
    config = make_config(Path("store"), denoiser=BASE).denoiser
    settings = {"micro_batch_size": 1, "shape": (16, 16), "num_tokens": 4, "bytes_per_activation": 4}
    plain, less = (
        estimate_memory(config, **settings, num_averages=1, num_shards=1, optimizer=OptimizerConfig(on_cpu=flag))  # type: ignore[arg-type]
        for flag in (False, True)
    )
    assert less.optimizer == 0
    assert plain.total - less.total == plain.optimizer == 2 * plain.gradients
