"""Muon: which parameters it has, the published update, and the same numbers sharded, interrupted and alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from imagen_core.diffusion import Denoiser
from imagen_core.models.layers.transformer import TransformerLayer
from imagen_core.train import CheckpointMismatchError, OptimizerConfig, TrainConfig, TrainError, train
from imagen_core.train.memory import estimate_memory
from imagen_core.train.optimizer import make_optimizer, num_muon_parameters
from imagen_core.train.parallel.muon import GatheredMuon, MuonWithAdamW
from tests.imagen_core.train.processes import job, launched, newest
from tests.imagen_core.train.small import files, make_config, tensors

MUON = {"lr": 1e-3, "warmup_steps": 3, "kind": "muon"}
WITH_KERNELS = MUON | {"muon": {"kernels": True}}


class Net(nn.Module):
    """An embedding, a first layer, a block and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.first = nn.Linear(8, 8)
        self.block = TransformerLayer(8, num_heads=2, head_dim=4, ff_mult=2)
        self.last = nn.Linear(8, 3)


def with_muon(model: nn.Module, optimizer: Any) -> set[str]:
    assert isinstance(optimizer, MuonWithAdamW)
    return {name for name, p in model.named_parameters() if id(p) in optimizer.matrices}


def muon(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate(MUON | changes)


def test_the_matrices_of_linear_layers_in_blocks_are_muons_and_the_rest_adamws() -> None:
    model = Net()
    optimizer = make_optimizer(model, muon())
    inside = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert with_muon(model, optimizer) == {name for name in inside if name.startswith("block.")}
    assert len(with_muon(model, optimizer)) >= 4
    every = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(map(id, model.parameters()))


def test_convolutions_of_a_unet_stay_with_adamw() -> None:
    model = Denoiser(make_config(Path("store")).denoiser)
    found = with_muon(model, make_optimizer(model, muon()))
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    assert found
    assert {shapes[name] for name in found} == {2}
    assert not any(name.startswith(("net.inputs", "net.out")) for name in found)


def test_kernels_of_convolutions_in_blocks_are_muons_if_asked_for() -> None:
    model = Denoiser(make_config(Path("store")).denoiser)
    found = with_muon(model, make_optimizer(model, OptimizerConfig.model_validate(WITH_KERNELS)))
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    assert {shapes[name] for name in found} == {2, 4}
    assert not {"net.conv_in.weight", "net.conv_out.weight"} & found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_is_updated_as_the_matrix_of_its_outputs(memory_format: torch.memory_format) -> None:
    conv, linear = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=memory_format), nn.Linear(36, 6, bias=False)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.permute(0, 2, 3, 1).flatten(1))
    optimizers = [
        GatheredMuon([{"params": [layer.weight]}], lr=0.02, weight_decay=0.1, momentum=0.9) for layer in (conv, linear)
    ]
    for step in range(3):
        gradient = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(step))
        conv.weight.grad = gradient.to(memory_format=memory_format)
        linear.weight.grad = gradient.permute(0, 2, 3, 1).flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(conv.weight.permute(0, 2, 3, 1).flatten(1), linear.weight)
    assert optimizers[0].state[conv.weight]["momentum_buffer"].shape == conv.weight.shape


def test_groups_decide_before_the_rule() -> None:
    model = Net()
    groups = [
        {"match": "first", "optimizer": "muon", "lr": 2e-3},
        {"match": "block", "optimizer": "adamw"},
        {"match": "last", "weight_decay": 0.5},
    ]
    optimizer = make_optimizer(model, muon(groups=groups))
    assert with_muon(model, optimizer) == {"first.weight"}
    (group,) = [group for group in optimizer.param_groups if "momentum" in group]
    assert (group["lr_scale"], group["weight_decay"]) == (2.0, 0.01)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"groups": [{"match": "embed|block", "optimizer": "adamw"}]},
            TrainError,
            "optimizer.kind: muon is for the matrices",
        ),
        (
            {"groups": [{"match": ".*bias", "optimizer": "muon"}]},
            TrainError,
            r"groups.0.optimizer: muon is for matrices",
        ),
        ({"on_cpu": True}, ValidationError, "on_cpu: is for kind=adamw; Muon's momentum"),
        ({"kind": "adamw", "muon": {"momentum": 0.9}}, ValidationError, "muon: is for kind=muon"),
        (
            {"kind": "adamw", "groups": [{"match": "a", "optimizer": "muon"}]},
            ValidationError,
            r"groups.0.optimizer: is for kind=muon \(got kind=adamw\)",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make_optimizer(Net(), muon(**changes))


def test_an_adapter_is_refused(store: Path) -> None:
    with pytest.raises(ValidationError, match=r"optimizer.kind: muon orthogonalises whole matrices"):
        make_config(store, optimizer=MUON, lora={}, init_from={"path": "base"})


@pytest.mark.parametrize(("adjust", "factor"), [("match_rms_adamw", 0.2 * 16**0.5), ("original", 2**0.5)])
def test_an_update_is_the_orthogonal_factor_of_the_momentum(adjust: str, factor: float) -> None:
    """Against the singular vectors: Newton-Schulz in bfloat16 leaves singular values between 0.6 and 1.3."""
    model = nn.Module()
    model.block = TransformerLayer(8, num_heads=2, head_dim=4, ff_mult=2)
    config = muon(weight_decay=0.5, lr=0.01, muon={"momentum": 0.9, "adjust_lr": adjust})
    optimizer = make_optimizer(model, config)
    assert isinstance(optimizer, MuonWithAdamW)
    weight = next(p for p in model.parameters() if id(p) in optimizer.matrices and tuple(p.shape) == (16, 8))
    before, momentum = weight.detach().clone(), torch.zeros(16, 8)
    for seed in range(3):
        gradient = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        direction = 0.1 * gradient + 0.9 * momentum
        update = (before * (1 - 0.01 * 0.5) - weight.detach()) / (0.01 * factor)
        left, _, right = torch.linalg.svd(direction, full_matrices=False)
        inside = left.T @ update @ right.T
        singular = torch.diagonal(inside)
        assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.3
        torch.testing.assert_close(inside, torch.diag(singular), rtol=0, atol=0.05)
        before = weight.detach().clone()


def test_the_memory_estimate_has_one_moment_for_muons_matrices(store: Path) -> None:
    config = make_config(store)
    settings: dict[str, Any] = {"micro_batch_size": 1, "shape": (16, 16), "num_tokens": 4, "bytes_per_activation": 4}

    def estimate(kind: OptimizerConfig) -> int:
        return estimate_memory(config.denoiser, **settings, num_averages=1, num_shards=1, optimizer=kind).optimizer

    saved = 4 * num_muon_parameters(Denoiser(config.denoiser), muon())
    assert saved > 0
    assert estimate(OptimizerConfig()) - estimate(muon()) == saved


def test_a_checkpoint_of_another_optimizer_is_refused_by_name(store: Path, tmp_path: Path) -> None:
    train(make_config(store, num_steps=1), tmp_path)
    with pytest.raises(
        CheckpointMismatchError, match=r"its optimizer has no momentum_buffer of net.*optimizer.kind, muon"
    ):
        train(make_config(store, num_steps=2, optimizer=MUON), tmp_path)


@pytest.mark.slow
def test_a_training_with_muon_resumes_exactly_and_reduces_the_loss(store: Path, tmp_path: Path) -> None:
    def config(num_steps: int) -> TrainConfig:
        return make_config(store, num_steps=num_steps, precision="float32", batch_size=3, optimizer=WITH_KERNELS)

    straight = train(config(12), tmp_path / "a")
    train(config(5), tmp_path / "b")
    resumed = train(config(12), tmp_path / "b")
    assert files(resumed["checkpoint"]) == files(straight["checkpoint"])
    names = {
        name.rpartition("/")[2].partition(".")[0] for name in tensors(straight["checkpoint"]) if "optimizer" in name
    }
    assert names == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}


SETTINGS: dict[str, Any] = {"num_steps": 3, "batch_size": 4, "optimizer": WITH_KERNELS}


@pytest.fixture(scope="module")
def two(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    train(make_config(store, **SETTINGS), folder / "one")
    kinds = ("ddp", "fsdp2")
    with launched(folder, [job(store, folder / kind, **SETTINGS, parallel={"kind": kind}) for kind in kinds]):
        pass
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(two: Path, kind: str) -> None:
    """bfloat16 in the update magnifies the last bits of gradients that were summed in another order."""
    found, wanted = tensors(newest(two / kind)), tensors(newest(two / "one"))
    assert found.keys() == wanted.keys()
    errors = [float((found[name] - wanted[name]).abs().max()) for name in wanted if name.startswith("model/")]
    assert max(errors) < 1e-5


def test_tensors_of_a_step_are_those_of_torchs_muon() -> None:
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    optimizer = make_optimizer(model, muon(weight_decay=0.1))
    names = with_muon(model, optimizer)
    named = dict(reference.named_parameters())
    torchs = torch.optim.Muon(
        [named[name] for name in sorted(names)], lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(2):
        for (_, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        optimizer.step()
        torchs.step()
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if name in names}
    assert all(torch.equal(p, named[name]) for name, p in found.items())


def test_a_configuration_without_muon_is_recorded_as_ever() -> None:
    recorded = json.loads(OptimizerConfig(groups=({"match": "net"},)).model_dump_json())  # type: ignore[arg-type]
    assert not {"kind", "muon", "decay_fraction", "decay_shape"} & recorded.keys()
    assert "optimizer" not in recorded["groups"][0]
