"""A run that was stopped, killed or changed in the middle ends as the one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_core.train import TrainingStopped, train, trainer
from imagen_core.train.checkpoints.checkpoint import checkpoints
from imagen_core.train.checkpoints.kept import remove_old, validation_losses
from tests.imagen_core.train.small import FLOW, SUPER, files, make_config, metrics, tensors

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"optimizer": {"lr": 1e-3, "warmup_steps": 3, "schedule": "cosine", "decay_steps": 20}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "precision": "float32",
                "denoiser": SUPER,
                "views": {"crop_px": 16, "horizontal_flip": True},
                "batch_size": 6,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "precision": "float32",
                "optimizer": {
                    "lr": 1e-3,
                    "warmup_steps": 3,
                    "groups": [
                        {"match": "net.inputs", "lr": 1e-4, "weight_decay": 0.1},
                        {"match": ".*norm", "lr": 5e-3},
                    ],
                },
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"precision": "bfloat16", "compute": {"channels_last": False}, "ema": {"rates": [0.9], "every_steps": 3}},
            marks=pytest.mark.slow,
        ),
        pytest.param({"denoiser": SUPER | {"diffusion": FLOW}}, marks=pytest.mark.slow),
    ],
    ids=["base", "super-resolution", "groups", "bfloat16", "flow"],
)
def test_20_steps_are_10_and_10(store: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {"precision": "float32", "batch_size": 3} | changes  # stops within an epoch, and ends in the second
    straight = train(make_config(store, num_steps=20, **changes), tmp_path / "a")
    train(make_config(store, num_steps=10, **changes), tmp_path / "b")
    resumed = train(make_config(store, num_steps=20, **changes), tmp_path / "b")
    assert files(resumed["checkpoint"]) == files(straight["checkpoint"])
    assert resumed["samples"] == straight["samples"]
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert all(a[name] == b[name] for name in ("step", "samples", "loss", "grad_norm", "lr"))


def test_a_stopped_run_resumes_exactly(store: Path, tmp_path: Path) -> None:
    config = make_config(store, num_steps=6)
    straight = train(config, tmp_path / "a")
    stop_requested = 0

    def should_stop() -> bool:
        nonlocal stop_requested
        stop_requested += 1
        return stop_requested == 4

    with pytest.raises(TrainingStopped, match="stopped after step 4, and saved its checkpoint"):
        train(config, tmp_path / "b", should_stop=should_stop)
    assert [path.name for path in checkpoints(tmp_path / "b" / "checkpoints")] == ["step-00000004"]
    resumed = train(config, tmp_path / "b")
    assert files(resumed["checkpoint"]) == files(straight["checkpoint"])


def test_a_finished_run_does_nothing_again(store: Path, tmp_path: Path) -> None:
    first = train(make_config(store), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in Path(first["checkpoint"]).iterdir()}
    again = train(make_config(store), tmp_path)
    assert (again["steps"], again["samples"], again["checkpoint"]) == (6, 48, first["checkpoint"])
    assert {path: path.stat().st_mtime_ns for path in Path(first["checkpoint"]).iterdir()} == before
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_the_newest_checkpoints_are_kept_and_leftovers_removed(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-step-00000003").mkdir(parents=True)
    (folder / "step-00000099").mkdir()  # being removed when killed: no state.json
    config = make_config(store, num_steps=7, checkpoints={"every_steps": 2, "keep": 2})
    train(config, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000006", "step-00000007"]


@pytest.mark.slow
def test_a_finished_wsd_training_is_continued_from_before_its_decay(store: Path, tmp_path: Path) -> None:
    wsd = {"lr": 1e-3, "warmup_steps": 2, "schedule": "wsd", "decay_fraction": 0.25}
    settings = {"optimizer": wsd, "checkpoints": {"every_steps": 5, "keep": 1}, "precision": "float32"}
    train(make_config(store, num_steps=12, **settings), tmp_path / "short")
    before = tmp_path / "short/checkpoints/step-00000009"  # of 12 steps the last 3 decay
    assert [path.name for path in checkpoints(before.parent)] == ["step-00000009", "step-00000012"]
    shutil.copytree(before, tmp_path / "long/checkpoints" / before.name)
    continued = train(make_config(store, num_steps=16, **settings), tmp_path / "long")
    straight = train(make_config(store, num_steps=16, **settings), tmp_path / "straight")
    assert files(continued["checkpoint"]) == files(straight["checkpoint"])


@pytest.mark.slow
def test_the_checkpoints_of_least_validation_loss_are_kept_in_addition_to_the_newest(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 5.0, 1.0, 1.0, 4.0, 4.0, 2.0, 2.0, 3.0, 3.0, 6.0, 6.0])  # without and with averages
    monkeypatch.setattr(trainer, "validation_metrics", lambda *_: {"validation_loss": next(losses)})
    kept = {"keep": 1, "keep_best": 2, "every_steps": 1}
    settings = {"checkpoints": kept, "validation": {"num_samples": 4, "every_steps": 1}}
    train(make_config(store, num_steps=3, **settings), tmp_path)
    summary = train(make_config(store, num_steps=6, **settings), tmp_path)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [
        f"step-0000000{step}" for step in (2, 4, 6)
    ]
    assert summary["best_checkpoint"] == str(tmp_path / "checkpoints/step-00000002")
    assert summary["checkpoint"] == str(tmp_path / "checkpoints/step-00000006")


@pytest.mark.parametrize("changes", [{}, {"validation": {"num_samples": 4, "every_steps": 3}}])
def test_the_best_can_only_be_kept_where_each_is_validated(store: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"checkpoints.keep_best is 1: set validation.num_samples"):
        make_config(store, checkpoints={"keep_best": 1, "every_steps": 4}, **changes)


@pytest.mark.slow
def test_batch_and_precision_may_change(store: Path, tmp_path: Path) -> None:
    train(make_config(store, num_steps=3), tmp_path)
    changed = make_config(
        store, num_steps=5, batch_size=4, precision="float32", micro_batch_size=3, ema={"rates": [0.9, 0.7]}
    )
    summary = train(changed, tmp_path)
    assert (summary["steps"], summary["samples"]) == (5, 3 * 8 + 2 * 4)
    kept = tensors(summary["checkpoint"])
    assert kept["model/net.conv_in.weight"].dtype == torch.float32
    assert {name.split("/")[0] for name in kept} == {"model", "optimizer", "ema-0.9", "ema-0.7"}


@pytest.mark.slow
def test_groups_of_the_optimizer_may_change_when_a_run_resumes(store: Path, tmp_path: Path) -> None:
    """Its moments belong to the parameters: with equal settings the groups change nothing."""
    straight = train(make_config(store, num_steps=6), tmp_path / "a")
    train(make_config(store, num_steps=3), tmp_path / "b")
    same = {"lr": 1e-3, "warmup_steps": 3, "groups": [{"match": "net.inputs"}, {"match": ".*conv"}]}
    resumed = train(make_config(store, num_steps=6, optimizer=same), tmp_path / "b")
    assert files(resumed["checkpoint"]) == files(straight["checkpoint"])


@pytest.mark.slow
def test_a_killed_process_resumes_exactly(store: Path, tmp_path: Path) -> None:
    config = make_config(store, num_steps=60, checkpoints={"every_steps": 3})
    job = {"config": config.model_dump(mode="json"), "out": str(tmp_path / "killed")}
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([job]), encoding="utf-8")
    command = [sys.executable, "-m", "tests.imagen_core.train.worker", str(jobs)]
    kills = 0
    for wait_s in (0.5, 0.8, 1.1):
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        started_with = len(checkpoints(tmp_path / "killed" / "checkpoints"))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(checkpoints(tmp_path / "killed" / "checkpoints")) > started_with or started_with >= 5:
                time.sleep(wait_s)
                break
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(timeout=30)
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    straight = train(config, tmp_path / "straight")
    resumed = checkpoints(tmp_path / "killed" / "checkpoints")[-1]
    assert kills >= 1
    assert files(resumed) == files(straight["checkpoint"])
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(1, 61))


class Killed(BaseException):
    """Ends a training as a kill does: nothing of it runs on."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps", [pytest.param(4, marks=pytest.mark.slow), 2], ids=["in the middle", "after the last step"]
)
@pytest.mark.parametrize(
    "at",
    ["validation_metrics", *(pytest.param(at, marks=pytest.mark.slow) for at in ("record_validation", "sample_grid"))],
)
def test_what_a_kill_left_out_after_a_checkpoint_is_done_on_resume(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, steps: int
) -> None:
    settings: dict[str, Any] = {
        "num_steps": steps,
        "checkpoints": {"every_steps": 2, "keep": 1, "keep_best": 1},
        "validation": {"num_samples": 4, "every_steps": 2},
        "grid": {"every_steps": 2, "num_images": 1, "num_steps": 1},
    }
    straight = train(make_config(store, **settings), tmp_path / "a")

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer, at, killed)
        with pytest.raises(Killed):
            train(make_config(store, **settings), tmp_path / "b")
    assert [path.name for path in checkpoints(tmp_path / "b/checkpoints")] == ["step-00000002"]
    resumed = train(make_config(store, **settings), tmp_path / "b")
    for name in ("validation_loss", "loss", "steps", "samples"):
        assert resumed[name] == straight[name]
    assert Path(resumed["best_checkpoint"]).name == Path(straight["best_checkpoint"]).name
    for name in ("validation.json", *(f"grids/step-0000000{step}.png" for step in range(2, steps + 1, 2))):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name
    lines = [[line for line in metrics(tmp_path / run) if "validation_loss" in line] for run in "ab"]
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.parametrize(("last_loss", "kept"), [(0.5, [4]), (5.0, [2, 4])])
def test_checkpoints_that_a_kill_left_are_removed_on_resume_also_after_the_last_step(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_loss: float, kept: list[int]
) -> None:
    losses, folder = [2.0, 1.0, 3.0, last_loss], tmp_path / "checkpoints"
    config = make_config(
        store,
        num_steps=4,
        checkpoints={"every_steps": 1, "keep": 1, "keep_best": 1},
        validation={"num_samples": 4, "every_steps": 1},
    )

    def killed_at_the_end(*arguments: Any, **options: Any) -> None:
        if (folder / "step-00000004").exists():
            raise Killed
        remove_old(*arguments, **options)

    monkeypatch.setattr(
        trainer,
        "validation_metrics",
        lambda *_: {"validation_loss": losses[int(checkpoints(folder)[-1].name[-1]) - 1]},
    )
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "remove_old", killed_at_the_end)
        with pytest.raises(Killed):
            train(config, tmp_path)
    assert [path.name[-1] for path in checkpoints(folder)] == ["2", "3", "4"]
    for _ in range(2):  # the second start has nothing to do
        train(config, tmp_path)
        assert [int(path.name[-1]) for path in checkpoints(folder)] == kept
        assert validation_losses(folder) == {f"step-0000000{step}": losses[step - 1] for step in kept}


def test_validation_losses_that_are_lost_or_damaged_are_taken_from_the_metrics(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"checkpoints": {"every_steps": 1}, "validation": {"num_samples": 4, "every_steps": 1}}
    train(make_config(store, num_steps=2, **settings), tmp_path)
    file = tmp_path / "validation.json"
    before = file.read_bytes()
    for spoil in (file.unlink, lambda: file.write_bytes(b""), lambda: file.write_bytes(before.replace(b"0.", b"1."))):
        spoil()
        losses = validation_losses(tmp_path / "checkpoints")
        assert losses == {name: value for name, value in json.loads(before).items() if name != "sha256"}
    assert "validation.json: was changed since it was written" in caplog.text
    train(make_config(store, num_steps=3, **settings), tmp_path)
    assert sorted(json.loads(file.read_bytes())) == ["sha256", "step-00000001", "step-00000002", "step-00000003"]
