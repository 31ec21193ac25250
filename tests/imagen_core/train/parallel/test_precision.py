"""float16: the loss is scaled, gradients that overflow are left out, and the scale is part of the checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_core.sealed import read_sealed, write_sealed
from imagen_core.train import NonFiniteLossError, train, trainer
from imagen_core.train.checkpoints.checkpoint import checkpoints
from imagen_core.train.data.example import Example
from imagen_core.train.loss import Losses
from imagen_core.train.parallel.precision import LossScale
from tests.imagen_core.train.small import files, make_config, metrics, tensors


def scale_of(out: Path) -> dict[str, Any] | None:
    return json.loads((checkpoints(out / "checkpoints")[-1] / "state.json").read_text())["loss_scale"]


def test_the_scale_halves_at_an_overflow_and_doubles_after_2000_good_steps() -> None:
    scale = LossScale()
    assert scale.value == 65536
    for _ in range(1999):
        scale.grow()
    scale.shrink()
    assert (scale.value, scale.good_steps) == (32768, 0)
    for _ in range(2000):
        scale.grow()
    assert (scale.value, scale.good_steps) == (65536, 0)
    for _ in range(2000 * 12):
        scale.grow()
    assert scale.value == 2**24


def test_float16_trains_as_float32_does_to_its_rounding(store: Path, tmp_path: Path) -> None:
    for precision in ("float16", "float32"):
        train(make_config(store, batch_size=2, num_steps=2, precision=precision), tmp_path / precision)
    for half, full in zip(metrics(tmp_path / "float16"), metrics(tmp_path / "float32"), strict=True):
        assert half["loss"] == pytest.approx(full["loss"], rel=0.01)
        assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.03)
        assert half["loss_scale"] == 65536
    assert scale_of(tmp_path / "float16") == {"value": 65536.0, "good_steps": 2}
    assert scale_of(tmp_path / "float32") is None
    kept = tensors(checkpoints(tmp_path / "float16" / "checkpoints")[-1])
    assert kept["model/net.conv_in.weight"].dtype == torch.float32


@pytest.mark.slow
def test_resume_is_exact_in_float16(store: Path, tmp_path: Path) -> None:
    straight = train(make_config(store, batch_size=2, num_steps=4, precision="float16"), tmp_path / "a")
    train(make_config(store, batch_size=2, num_steps=2, precision="float16"), tmp_path / "b")
    resumed = train(make_config(store, batch_size=2, num_steps=4, precision="float16"), tmp_path / "b")
    assert files(resumed["checkpoint"]) == files(straight["checkpoint"])
    assert scale_of(tmp_path / "b") == scale_of(tmp_path / "a") == {"value": 65536.0, "good_steps": 4}


def test_steps_whose_gradients_overflow_are_left_out(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that is far too large is halved until gradients fit; until then nothing is learned."""
    monkeypatch.setattr(trainer, "LossScale", lambda: LossScale(2.0**130))
    train(make_config(store, batch_size=2, num_steps=2, precision="float16"), tmp_path / "a")
    assert scale_of(tmp_path / "a") == {"value": 2.0**128, "good_steps": 0}
    kept = tensors(checkpoints(tmp_path / "a" / "checkpoints")[-1])
    assert all(float(values.abs().max()) == 0 for name, values in kept.items() if name.startswith("optimizer/"))
    assert [line["grad_norm"] for line in metrics(tmp_path / "a")] == [0, 0]
    for name in (name for name in kept if name.startswith("model/")):
        assert torch.equal(kept[name], kept[name.replace("model/", "ema-0.9/")])
    monkeypatch.undo()
    state = checkpoints(tmp_path / "a" / "checkpoints")[-1] / "state.json"
    write_sealed(state, read_sealed(state) | {"loss_scale": {"value": 256.0, "good_steps": 0}})
    train(make_config(store, batch_size=2, num_steps=3, precision="float16"), tmp_path / "a")
    assert scale_of(tmp_path / "a") == {"value": 256.0, "good_steps": 1}


def test_what_no_scale_can_help_is_an_error(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "LossScale", lambda: LossScale(1.0))
    original = trainer.TrainingLoss.forward

    def forward(self: trainer.TrainingLoss, example: Example) -> Losses:
        losses = original(self, example)
        return losses._replace(diffusion=losses.diffusion * torch.nan)

    monkeypatch.setattr(trainer.TrainingLoss, "forward", forward)
    with pytest.raises(NonFiniteLossError):
        train(make_config(store, batch_size=2, num_steps=1, precision="float16"), tmp_path)


def test_cudnn_measures_its_convolutions_in_the_training_only(store: Path, tmp_path: Path) -> None:
    seen = []

    def stop_requested() -> bool:
        seen.append(torch.backends.cudnn.benchmark)
        return False

    before = torch.backends.cudnn.benchmark
    for autotune in (True, False):
        config = make_config(store, num_steps=1, compute={"cudnn_autotune": autotune})
        train(config, tmp_path / str(autotune), should_stop=stop_requested)
        assert torch.backends.cudnn.benchmark == before
    assert seen == [True, before]


def test_tf32_is_for_the_training_only(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop_requested() -> bool:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return False

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for tf32 in (True, False):
        train(
            make_config(store, num_steps=1, compute={"tf32": tf32}), tmp_path / str(tf32), should_stop=stop_requested
        )
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert seen == [("high", True), ("highest", False)]
