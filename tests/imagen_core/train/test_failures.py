"""What a training leaves behind when it fails for a reason of its own, or hangs."""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_core.train import NonFiniteLossError, TrainConfig, step, train, trainer
from imagen_core.train.adamw import DenseAdamW
from imagen_core.train.checkpoints.state import TrainState
from tests.imagen_core.train.small import changed, files, make_config, make_store


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return make_config(make_store(tmp_path / "store"), num_steps=4)


def saved(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("*"))


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: Exception) -> None:
    """Lets the call of this number fail, after it has done its work."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if next(calls) == call:
            raise error
        return result

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.slow
def test_an_error_after_a_step_leaves_its_checkpoint_from_which_the_training_resumes_exactly(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    straight = train(config, tmp_path / "straight")
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        fail_at(patch, trainer.Loggers, "scalars", 3, RuntimeError("the logger broke"))
        with pytest.raises(RuntimeError, match="the logger broke"):
            train(config, tmp_path / "cut")
    assert saved(tmp_path / "cut") == ["step-00000003"]
    assert "step 3 is saved in a checkpoint after an error" in caplog.text
    resumed = train(config, tmp_path / "cut")
    assert files(resumed["checkpoint"]) == files(straight["checkpoint"])


@pytest.mark.slow
def test_an_error_in_the_backward_pass_leaves_the_step_before_it(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        fail_at(patch, step, "_backward", 3, torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(torch.OutOfMemoryError):
            train(config, tmp_path / "cut")
    assert saved(tmp_path / "cut") == ["step-00000002"]
    assert files(train(config, tmp_path / "cut")["checkpoint"]) == files(straight["checkpoint"])


def test_an_error_within_an_update_leaves_no_checkpoint(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, DenseAdamW, "step", 2, RuntimeError("half updated"))
    with pytest.raises(RuntimeError, match="half updated"):
        train(config, tmp_path / "run")
    assert saved(tmp_path / "run") == []


def test_a_loss_that_is_not_finite_leaves_no_checkpoint(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = step._clip_gradients, iter(range(10))
    monkeypatch.setattr(
        step, "_clip_gradients", lambda *args: original(*args) * (float("nan") if next(calls) == 2 else 1)
    )
    with pytest.raises(NonFiniteLossError):
        train(config, tmp_path / "run")
    assert saved(tmp_path / "run") == []


def test_an_error_of_saving_does_not_hide_the_first_one(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_at(monkeypatch, trainer.Loggers, "scalars", 2, RuntimeError("the logger broke"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(TrainState, "save", full)
    with pytest.raises(RuntimeError, match="the logger broke"):
        train(config, tmp_path / "run")
    assert "step 2 cannot be saved after an error: no space left" in caplog.text
    assert saved(tmp_path / "run") == []


def test_a_step_over_its_limit_ends_the_process_with_code_75(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here without ending it: the batch that hangs comes once the exit was called."""
    ended, codes = threading.Event(), list[int]()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(os, "_exit", end)
    original, calls = trainer.BatchStream.next, iter(range(1, 10))

    def hanging(stream: Any) -> Any:
        if next(calls) == 2 and not ended.wait(60):
            raise AssertionError("nothing ended the process")
        return original(stream)

    monkeypatch.setattr(trainer.BatchStream, "next", hanging)
    train(changed(config, num_steps=2, compute={"step_limit_s": 0.05}), tmp_path / "run")
    assert codes == [75]
    assert "compute.step_limit_s: step 2 takes more than 0.05 s" in caplog.text


def test_the_first_step_of_a_start_and_faster_ones_have_no_limit(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = list[float | None]()
    original = trainer.step_limit

    def noted(limit_s: float | None, number: int) -> Any:
        limits.append(limit_s)
        return original(limit_s, number)

    monkeypatch.setattr(trainer, "step_limit", noted)
    train(changed(config, compute={"step_limit_s": 3600}), tmp_path / "run")
    assert limits == [None, 3600, 3600, 3600]
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()), "no timer is left"
