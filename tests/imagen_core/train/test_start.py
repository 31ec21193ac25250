"""What a training starts with is shown and recorded, and so is what changed since its checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from imagen_core.train import TrainError, TrainingProgress, TrainingStart, load_checkpoint, train
from imagen_core.train.start import refuse_lost
from tests.imagen_core.train.small import make_config


@pytest.fixture(scope="module")
def starts(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrainingStart]]:
    """A training of 1 step that resumes to 2 with another learning rate and batch size, then once more."""
    out, shown = tmp_path_factory.mktemp("starts"), list[TrainingStart]()
    changes = {"optimizer": {"lr": 5e-4, "warmup_steps": 3}, "batch_size": 4}
    train(make_config(store, num_steps=1), out, on_start=shown.append)
    for _ in range(2):
        train(make_config(store, num_steps=2, **changes, logging={"every_steps": 2}), out, on_start=shown.append)
    return out, shown


def test_a_start_tells_model_machine_data_and_step(starts: tuple[Path, list[TrainingStart]]) -> None:
    out, (first, second, third) = starts
    denoiser = load_checkpoint(out / "checkpoints/step-00000001", "model").denoiser
    assert first.parameters == sum(parameter.numel() for parameter in denoiser.parameters())
    assert (first.step, second.step, third.step) == (0, 1, 2)
    assert (first.model, first.device, first.processes, first.precision) == ("regular of 16 px", "cpu", 1, "float64")
    assert (first.samples, first.batch_size, first.torch) == (40, 8, torch.__version__)
    assert first.lines() == [
        f"model regular of 16 px, {first.parameters:,} parameters, float64 on cpu",
        "data 40 samples, batches of 8: 1 steps are 0.2 epochs; begins",
    ]


def test_changed_settings_are_shown_and_recorded_when_a_training_resumes(
    starts: tuple[Path, list[TrainingStart]],
) -> None:
    out, (first, second, third) = starts
    assert first.changes == third.changes == ()
    assert second.changes == ("batch_size: 8 -> 4", "num_steps: 1 -> 2", "optimizer.lr: 0.001 -> 0.0005")
    assert "changed since the checkpoint: optimizer.lr: 0.001 -> 0.0005" in second.lines()
    assert "resumed from step 1" in second.lines()[1]
    recorded = [json.loads(line) for line in (out / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in recorded] == [0, 1], "a finished training starts nothing"
    assert recorded[1]["changes"] == list(second.changes)
    assert recorded[0]["time"] < recorded[1]["time"]


def test_progress_tells_the_time_that_is_left(store: Path, tmp_path: Path) -> None:
    shown: list[TrainingProgress] = []
    train(make_config(store, num_steps=3), tmp_path, on_progress=shown.append)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [progress.remaining_s for progress in shown] == [
        pytest.approx(left * line["step_s"]) for left, line in zip((2, 1, 0), lines, strict=True)
    ]


@pytest.mark.parametrize(
    ("step", "start", "refused"),
    [
        (122, {"step": 0, "checkpoint_every_steps": 100}, True),
        (100, {"step": 0, "checkpoint_every_steps": 100}, False),  # killed before its first checkpoint
        (122, {"step": 0, "checkpoint_every_steps": 1000}, False),
        (7, {"step": 5, "checkpoint_every_steps": 1000}, True),  # it had resumed from one
        (122, {"step": 0}, True),  # of an earlier version: by the settings now, 100 steps
        (122, None, True),
        (None, None, False),
    ],
)
def test_a_training_that_lost_its_checkpoints_is_not_begun_anew(
    store: Path, tmp_path: Path, step: int | None, start: dict[str, int] | None, refused: bool
) -> None:
    config = make_config(store, checkpoints={"every_steps": 100})
    if step is not None:
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}, "loss": 1.0}}\n')
    if start is not None:
        (tmp_path / "starts.jsonl").write_text(json.dumps(start) + "\n")
    if not refused:
        refuse_lost(tmp_path, config)
        return
    with pytest.raises(TrainError, match=rf"was at step {step} and .* delete metrics.jsonl and starts"):
        train(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == f'{{"step": {step}, "loss": 1.0}}\n'
