"""Trainings of an adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_core.diffusion import PriorConfig
from imagen_core.train import (
    CheckpointError,
    CheckpointMismatchError,
    LoraUseConfig,
    TrainError,
    load_checkpoint,
    train,
)
from imagen_core.train.config import TrainConfig
from imagen_core.train.memory import estimate_memory
from tests.imagen_core.models.small import inputs, regular
from tests.imagen_core.train.processes import job, launched, newest
from tests.imagen_core.train.small import BASE, BASE_UNET, files, make_config, tensors

LAYERS = 4 * 4  # projections of each attention: one on the way down, one in the middle, two on the way up
RANK = 4
BYTES = 4 * RANK * 4 * ((32 + 32) + (32 + 64) + (16 + 64) + (32 + 32))
"""Of A and B of to_q, to_kv, context_to_kv and to_out of the four, float32."""


@pytest.fixture(scope="module")
def base(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    train(make_config(store, num_steps=3, precision="float32"), out)
    return out


def settings(base: Path, **changes: Any) -> dict[str, Any]:
    lora = {"lora": {"rank": RANK, "alpha": 8}, "init_from": {"path": str(base)}}
    return {"precision": "float32", "batch_size": 3} | lora | changes


def test_a_checkpoint_holds_the_adapter_alone_and_names_its_base(base: Path, store: Path, tmp_path: Path) -> None:
    checkpoint = Path(train(make_config(store, num_steps=2, **settings(base)), tmp_path)["checkpoint"])
    names = [name.removeprefix("model/") for name in tensors(checkpoint) if name.startswith("model/")]
    assert len(names) == 2 * LAYERS
    assert {".".join(name.split(".")[-2:]) for name in names} == {"lora_A.weight", "lora_B.weight"}
    for name in ("model", "ema-0.9", "ema-0.5"):
        values = {key: value for key, value in tensors(checkpoint).items() if key.startswith(f"{name}/")}
        assert sum(value.nbytes for value in values.values()) == BYTES
        size = (checkpoint / f"{name}.safetensors").stat().st_size
        assert BYTES < size < BYTES + 256 * len(values)  # and a header
    state = json.loads((checkpoint / "state.json").read_text())
    source = newest(base)
    assert state["lora"] == {
        "rank": RANK,
        "alpha": 8.0,
        "targets": None,
        "base": {
            "path": str(source),
            "step": 3,
            "weights": "ema-0.9",
            "sha256": json.loads((source / "state.json").read_text())["files"]["ema-0.9.safetensors"]["sha256"],
        },
    }
    start = json.loads((tmp_path / "starts.jsonl").read_text())
    assert start["adapter_parameters"] == BYTES // 4
    report = json.loads((tmp_path / "start.json").read_text())
    assert (report["left_random"], report["not_used"], report["checkpoint"]) == ([], [], str(source))


def test_the_weights_of_the_base_stay_bit_for_bit(base: Path, store: Path, tmp_path: Path) -> None:
    train(make_config(store, num_steps=2, **settings(base)), tmp_path)
    before = load_checkpoint(base).denoiser.state_dict()
    apart = load_checkpoint(tmp_path, lora=LoraUseConfig(merge=False)).denoiser.state_dict()
    kept = {name.replace(".base_layer.", "."): value for name, value in apart.items() if ".lora_" not in name}
    assert kept.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(kept[name], value), name
    merged = load_checkpoint(tmp_path).denoiser.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(merged[name], value)]
    assert len(changed) == LAYERS
    assert all("attention.attention.to_" in name or "context_to_kv" in name for name in changed)
    nothing = load_checkpoint(tmp_path, lora=LoraUseConfig(scale=0)).denoiser.state_dict()
    assert all(torch.equal(nothing[name], value) for name, value in before.items())


def test_merged_and_separate_adapters_generate_alike(base: Path, store: Path, tmp_path: Path) -> None:
    fast = {
        "optimizer": {"lr": 1e-2, "warmup_steps": 0},
        "lora": {"rank": 4, "targets": ["to_q", "conv1", "conv_out"]},
    }
    train(make_config(store, num_steps=4, **settings(base, **fast)), tmp_path)
    x, _, conditioning = inputs(regular(text_dim=8))
    sigma = torch.tensor([0.5, 2.0])
    found = [
        load_checkpoint(tmp_path, "model", LoraUseConfig(merge=merge)).denoiser(x, sigma, conditioning)
        for merge in (True, False)
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    plain = load_checkpoint(base).denoiser(x, sigma, conditioning)
    assert not torch.allclose(found[0], plain, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bfloat16", "micro_batch_size": 2},
        {"precision": "float16"},
        {"precision": "float64", "denoiser": BASE | {"unet": BASE_UNET | {"activation_checkpointing": True}}},
        {"compute": {"channels_last": True}, "lora": {"rank": 2, "targets": ["conv1", "to_q"]}},
    ],
    ids=["float32", "bfloat16", "float16", "checkpointed", "convolutions"],
)
def test_20_steps_are_10_and_10(base: Path, store: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = settings(base, **changes)
    straight = train(make_config(store, num_steps=20, **config), tmp_path / "a")
    train(make_config(store, num_steps=10, **config), tmp_path / "b")
    resumed = train(make_config(store, num_steps=20, **config), tmp_path / "b")
    assert files(resumed["checkpoint"]) == files(straight["checkpoint"])


@pytest.mark.slow
def test_a_compiled_network_trains_the_same_adapter(base: Path, store: Path, tmp_path: Path) -> None:
    plain = train(make_config(store, num_steps=2, **settings(base)), tmp_path / "a")
    compiled = train(make_config(store, num_steps=2, **settings(base, compute={"compile": True})), tmp_path / "b")
    found, expected = tensors(compiled["checkpoint"]), tensors(plain["checkpoint"])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(base: Path, store: Path, tmp_path: Path) -> None:
    config = {"precision": "float64", "num_steps": 3, "batch_size": 4}
    one = train(make_config(store, **settings(base, **config)), tmp_path / "one")
    kinds = ("ddp", "fsdp2")
    jobs = [job(store, tmp_path / kind, **settings(base, **config, parallel={"kind": kind})) for kind in kinds]
    with launched(tmp_path, jobs):
        pass
    expected = tensors(one["checkpoint"])
    for kind in kinds:
        found = tensors(newest(tmp_path / kind))
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-10)


def test_a_training_with_another_adapter_or_base_is_not_resumed(base: Path, store: Path, tmp_path: Path) -> None:
    config = settings(base)
    train(make_config(store, num_steps=1, **config), tmp_path / "run")

    def again(**changes: Any) -> None:
        train(make_config(store, num_steps=2, **config | changes), tmp_path / "run")

    with pytest.raises(CheckpointMismatchError, match=r"was trained with another lora: rank: 4 -> 5; restore it"):
        again(lora={"rank": 5, "alpha": 8})
    with pytest.raises(CheckpointMismatchError, match=r"trains an adapter; restore lora, or start in another --out"):
        again(lora=None, init_from=None)
    with pytest.raises(
        CheckpointMismatchError, match=r"trained on ema-0.9 of step 3 of .* has other weights \(step 3"
    ):
        again(init_from={"path": str(base), "weights": "model"})
    moved = tmp_path / "moved"
    base.rename(moved)
    try:
        again(init_from={"path": str(moved)})  # the same weights in another place
    finally:
        moved.rename(base)
    train(make_config(store, num_steps=1, precision="float32"), tmp_path / "full")
    with pytest.raises(CheckpointMismatchError, match=r"trains all weights; leave lora out"):
        train(make_config(store, num_steps=2, **config), tmp_path / "full")


def test_a_base_that_is_lost_or_another_one_is_refused_by_name(base: Path, store: Path, tmp_path: Path) -> None:
    train(make_config(store, num_steps=1, **settings(base)), tmp_path / "run")
    other = tmp_path / "other"
    train(make_config(store, num_steps=1, precision="float32", seed=5), other)
    with pytest.raises(CheckpointError, match=r"trained on step 3 of .*is another model.*as lora\.base"):
        load_checkpoint(tmp_path / "run", lora=LoraUseConfig(base=str(other)))
    with pytest.raises(CheckpointError, match=r"the base of its adapter cannot be loaded: .*gone: has no checkpoint"):
        load_checkpoint(tmp_path / "run", lora=LoraUseConfig(base=str(tmp_path / "gone")))
    found = load_checkpoint(tmp_path / "run", lora=LoraUseConfig(base=str(base)))
    assert found.sha256 == load_checkpoint(tmp_path / "run").sha256 != load_checkpoint(base).sha256
    with pytest.raises(CheckpointError, match=r"has no adapter; leave lora out"):
        load_checkpoint(base, lora=LoraUseConfig())


def test_a_base_of_another_architecture_is_refused(base: Path, store: Path, tmp_path: Path) -> None:
    wider = BASE | {"unet": BASE_UNET | {"embed_dim": 64}}
    with pytest.raises(TrainError, match=r"init_from.path .* tensors do not fit"):
        train(make_config(store, num_steps=1, **settings(base, denoiser=wider)), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None}, "lora: is an adapter of a trained model; name it as init_from.path"),
        ({"init_from": {"path": "b", "mismatch": "skip"}}, "init_from.mismatch: skip would leave weights random"),
        ({"lora": {"rank": 0}}, "lora.rank"),
    ],
)
def test_settings_that_do_not_fit_an_adapter_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(Path("store"), **settings(Path("base"), **changes))


def test_the_memory_of_an_adapter_is_that_of_its_own_gradients_and_moments(store: Path) -> None:
    config: TrainConfig = make_config(store, **settings(Path("base")))
    assert not isinstance(config.denoiser, PriorConfig)

    def estimate(**more: Any) -> Any:
        shape = {"micro_batch_size": 1, "shape": (16, 16), "num_tokens": 6, "bytes_per_activation": 4}
        return estimate_memory(config.denoiser, **shape, num_averages=2, num_shards=1, **more)

    full, adapter = estimate(), estimate(lora=config.lora)
    assert (adapter.gradients, adapter.optimizer, adapter.averages) == (BYTES, 2 * BYTES, 2 * BYTES)
    assert adapter.weights == full.weights + BYTES
    assert 0 < adapter.activations < full.activations


@pytest.mark.slow
def test_averages_of_an_adapter_are_rebuilt_from_its_snapshots(base: Path, store: Path, tmp_path: Path) -> None:
    def adapter(profiles: list[float], weights: str) -> dict[str, torch.Tensor]:
        ema = {"rates": [], "profiles": profiles, "snapshot_every_steps": 1}
        out = tmp_path / f"run-{len(profiles)}"
        train(make_config(store, num_steps=20, **settings(base, ema=ema)), out)
        found = load_checkpoint(out, weights, LoraUseConfig(merge=False)).denoiser.state_dict()
        return {name: values for name, values in found.items() if "lora_" in name}

    tracked, rebuilt = adapter([0.1], "power-0.1"), adapter([0.05, 0.2], "power-0.1")
    assert len(tracked) == 2 * LAYERS
    newest_of = adapter([0.1], "model")
    for name, values in tracked.items():
        apart, size = (torch.linalg.vector_norm(each) for each in (rebuilt[name] - values, values))
        assert apart < 1e-3 * size
        if "lora_B" in name:
            assert apart < 0.05 * torch.linalg.vector_norm(newest_of[name] - values)
