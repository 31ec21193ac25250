"""Metrics: one line a step in order, also after a kill; the optional places say how to install them."""

import builtins
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagen_core.train import TrainError
from imagen_core.train.logs import JsonLines, Loggers, last_values
from tests.imagen_core.train.small import make_config


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_after_the_step_resumed_from_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 0)
    for step in range(1, 6):
        first.scalars(step, {"loss": 1 / step})
    first.close()
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 6, "lo', encoding="utf-8")
    second = JsonLines(path, 3)
    second.scalars(4, {"loss": 0.5})
    second.close()
    assert steps(path) == [1, 2, 3, 4]
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[1]) == {"step": 2, "loss": 0.5}


def test_only_the_writing_process_writes(store: Path, tmp_path: Path) -> None:
    loggers = Loggers(make_config(store), tmp_path, 0, writes=False)
    loggers.scalars(1, {"loss": 1.0})
    loggers.close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_scalars_and_images(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = Loggers(make_config(store, logging={"loggers": ["jsonl", "tensorboard"]}), tmp_path, 0, writes=True)
    loggers.scalars(7, {"loss": 0.25})
    loggers.image(7, "grid", np.zeros((4, 6, 3), np.uint8))
    loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 0.25)]
    assert [(event.step, event.width, event.height) for event in events.Images("grid")] == [(7, 6, 4)]
    assert steps(tmp_path / "metrics.jsonl") == [7]


def test_wandb_gets_scalars_and_images_in_one_run_however_often_it_resumes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, started, logged = types.ModuleType("wandb"), [], []
    fake.Error = RuntimeError  # type: ignore[attr-defined]
    fake.Image = lambda pixels: pixels.shape  # type: ignore[attr-defined]
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    fake.init = lambda **settings: started.append(settings) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (7, 8):
        loggers = Loggers(make_config(store, logging={"loggers": ["wandb"]}), tmp_path, step - 1, writes=True)
        loggers.scalars(step, {"loss": 0.25})
        loggers.image(step, "grid", np.zeros((4, 6, 3), np.uint8))
        loggers.close()
    assert logged == [(step, values) for step in (7, 8) for values in ({"loss": 0.25}, {"grid": (4, 6, 3)})]
    assert started[0] == started[1]
    assert started[0]["resume"] == "allow"
    assert started[0]["config"]["store"] == str(store)


@pytest.mark.parametrize(
    ("name", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")],
)
def test_a_missing_package_is_named_with_the_pip_line(
    name: str, module: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(wanted: str, *args: Any, **kwargs: Any) -> Any:
        if wanted == module:
            raise ImportError(wanted)
        return real(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TrainError, match=rf"pip install '{name}>=[0-9.]+'"):
        Loggers(make_config(store, logging={"loggers": [name]}), tmp_path, 0, writes=True)


def test_what_wandb_refuses_is_an_error_with_its_remedy(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = types.ModuleType("wandb")
    fake.Error = type("Error", (Exception,), {})  # type: ignore[attr-defined]

    def init(**settings: Any) -> None:
        raise fake.Error("No API key configured")

    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(TrainError, match="loggers: wandb: No API key configured; run `wandb login`"):
        Loggers(make_config(store, logging={"loggers": ["wandb"]}), tmp_path, 0, writes=True)


def test_lines_that_cannot_be_read_are_named_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 1}\n{"step": \xff}\n5\n{"step": "two"}\n[1]\n{"step": 2, "loss": 0.5}\n{"st'
    )
    JsonLines(path, 3).close()
    assert steps(path) == [1, 2]
    assert "metrics.jsonl: line 2 of 6 cannot be read, and is removed" in caplog.text
    assert last_values(path) == {"step": 2, "loss": 0.5}


def test_a_cut_last_line_is_removed_without_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1}\n{"st')
    JsonLines(path, 3).close()
    assert steps(path) == [1]
    assert not caplog.text
