"""Snapshots of a training, and the weights that are rebuilt from them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from imagen_core.train import CheckpointError, CheckpointMismatchError, TrainConfig, load_checkpoint, train
from tests.imagen_core.train.processes import job, launched
from tests.imagen_core.train.small import files, make_config

PROFILES = {"rates": [], "profiles": [0.05, 0.1], "snapshot_every_steps": 2}
KEPT = {"checkpoints": {"keep": 1, "every_steps": 10}}


def config_of(store: Path, **changes: Any) -> TrainConfig:
    return make_config(store, **({"precision": "float32", "batch_size": 2, "ema": PROFILES} | KEPT | changes))


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of 40 steps with a snapshot at every other one."""
    out = tmp_path_factory.mktemp("run")
    train(config_of(store, num_steps=40), out)
    return out


def weights_of(path: Path, weights: str | None = None) -> dict[str, Tensor]:
    return dict(load_checkpoint(path, weights).denoiser.state_dict())


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative, over all tensors."""
    assert found.keys() == wanted.keys()
    a, b = (torch.cat([each[name].flatten().double() for name in sorted(wanted)]) for each in (found, wanted))
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def test_snapshots_stay_and_have_the_averages_alone_in_float16(run: Path) -> None:
    names = sorted(path.name for path in (run / "snapshots").iterdir())
    assert names == [f"step-{step:08d}" for step in range(2, 41, 2)]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000040"]
    snapshot = run / "snapshots/step-00000020"
    assert sorted(path.name for path in snapshot.iterdir()) == [
        "power-0.05.safetensors",
        "power-0.1.safetensors",
        "state.json",
    ]
    kinds = [values.dtype for values in load_file(snapshot / "power-0.1.safetensors").values()]
    assert kinds.count(torch.float16) > 0.9 * len(kinds)


@pytest.mark.slow
@pytest.mark.parametrize("length", [0.06, 0.07, 0.15])
def test_a_rebuilt_average_is_the_one_that_another_training_tracked(
    store: Path, run: Path, tmp_path: Path, length: float
) -> None:
    train(config_of(store, num_steps=40, ema=PROFILES | {"profiles": [length]}), tmp_path)
    tracked = weights_of(tmp_path, f"power-{length}")
    assert distance(weights_of(run, f"power-{length}"), tracked) < 1e-3
    assert distance(weights_of(run, "model"), tracked) > 5e-3
    early = weights_of(run / "snapshots/step-00000030", f"power-{length}")
    assert distance(early, weights_of(tmp_path / "snapshots/step-00000030", f"power-{length}")) < 1e-3


def test_a_length_that_is_there_is_read_and_the_longest_is_the_default(run: Path) -> None:
    exact = load_file(run / "checkpoints/step-00000040/power-0.1.safetensors")
    found = load_checkpoint(run)
    assert found.weights == "power-0.1"
    assert all(torch.equal(values, exact[name]) for name, values in found.denoiser.state_dict().items())
    assert load_checkpoint(run, "power-0.10").sha256 == found.sha256
    of_snapshot = load_checkpoint(run / "snapshots/step-00000020")
    assert (of_snapshot.weights, of_snapshot.step) == ("power-0.1", 20)
    assert {values.dtype for values in of_snapshot.denoiser.state_dict().values()} == {torch.float32}


def test_what_was_rebuilt_has_a_digest_of_all_it_comes_from(run: Path) -> None:
    digests = {load_checkpoint(run, weights).sha256 for weights in ("power-0.07", "power-0.08", "power-0.1")}
    assert len(digests) == 3
    assert load_checkpoint(run, "power-0.07").sha256 in digests


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("power-0.01", r"weights 'power-0.01' cannot be rebuilt from 40 averages of sigma_rel 0.05, 0.1: \d\d% of"),
        (
            "power-0.3",
            r"weights 'power-0.3': sigma_rel must be above 0 and at most 0.28 \(got 0.3\); give power-SIGMA",
        ),
        ("power-long", "weights 'power-long': could not convert"),
        ("ema-0.9", "has no weights 'ema-0.9'; choose from model, power-0.05, power-0.1"),
    ],
)
def test_weights_that_cannot_be_rebuilt_are_refused(run: Path, weights: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(run, weights)


@pytest.mark.slow
def test_without_snapshots_there_is_nothing_to_rebuild_from(store: Path, tmp_path: Path) -> None:
    train(config_of(store, num_steps=1, ema={"rates": [0.9]}), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"has no weights 'power-0.07', and there are no snapshots .* ema.profiles"
    ):
        load_checkpoint(tmp_path, "power-0.07")


def test_a_snapshot_that_was_changed_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.parent.name.startswith("step-"):
            target = copy / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    damaged = copy / "snapshots/step-00000020/power-0.05.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"step-00000020/power-0.05.safetensors: its checksum is not the one"):
        load_checkpoint(copy, "power-0.07")


@pytest.mark.slow
def test_a_training_that_was_interrupted_has_the_snapshots_of_one_that_was_not(
    store: Path, run: Path, tmp_path: Path
) -> None:
    train(config_of(store, num_steps=40, checkpoints={"every_steps": 10, "keep": 9}), tmp_path)
    for step in (20, 30, 40):  # back to the checkpoint of step 10, with later snapshots
        shutil.rmtree(tmp_path / f"checkpoints/step-{step:08d}")
    train(config_of(store, num_steps=16), tmp_path)
    names = sorted(path.name for path in (tmp_path / "snapshots").iterdir())
    assert names == [f"step-{step:08d}" for step in range(2, 17, 2)]
    train(config_of(store, num_steps=40), tmp_path)
    for step in range(2, 41, 2):
        name = f"snapshots/step-{step:08d}"
        assert files(tmp_path / name) == files(run / name)


@pytest.mark.slow
def test_profiles_that_would_begin_later_than_others_are_refused(store: Path, tmp_path: Path) -> None:
    train(config_of(store, num_steps=2), tmp_path)
    later = PROFILES | {"profiles": [0.05, 0.2]}
    with pytest.raises(CheckpointMismatchError, match=r"ema.profiles 0.2 would begin at step 2, but 0.05, 0.1 began"):
        train(config_of(store, num_steps=4, ema=later), tmp_path)
    train(config_of(store, num_steps=4, ema=PROFILES | {"profiles": [0.05]}), tmp_path)


@pytest.mark.slow
def test_profiles_may_begin_in_a_training_that_has_none(store: Path, tmp_path: Path) -> None:
    train(config_of(store, num_steps=4, ema={"rates": [0.5]}), tmp_path)
    train(config_of(store, num_steps=24), tmp_path)
    state = json.loads((tmp_path / "checkpoints/step-00000024/state.json").read_text(encoding="utf-8"))
    assert (state["power_since"], state["ema_updates"]) == (4, 24)
    assert distance(weights_of(tmp_path, "power-0.08"), weights_of(tmp_path, "power-0.1")) < 0.05


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_snapshots_of_two_processes_are_those_of_one(store: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_steps": 6, "batch_size": 4, "precision": "float64"}
    train(config_of(store, **settings), tmp_path / "one")
    kinds = ("ddp", "fsdp2")
    of = [job(store, tmp_path / kind, ema=PROFILES, **KEPT, **settings, parallel={"kind": kind}) for kind in kinds]
    with launched(tmp_path, of):
        pass
    for kind in kinds:
        found = weights_of(tmp_path / kind / "snapshots/step-00000006", "power-0.05")
        assert distance(found, weights_of(tmp_path / "one/snapshots/step-00000006", "power-0.05")) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profiles": [0.3]}, r"profiles.0\n.*less than or equal to 0.28"),
        ({"profiles": [0.1, 0.1]}, "profiles: each once"),
        ({"snapshot_every_steps": None}, "snapshot_every_steps is None: set both, or neither"),
        ({"profiles": []}, r"profiles are \[\] and snapshot_every_steps is 2: set both"),
    ],
)
def test_settings_that_do_not_fit_are_refused(store: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config_of(store, ema=PROFILES | changes)
