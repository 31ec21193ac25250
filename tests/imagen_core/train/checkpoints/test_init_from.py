"""A training that starts with the weights of another."""

import json
from pathlib import Path

import pytest
import torch

from imagen_core.train import TrainError, train
from tests.imagen_core.train.small import BASE, BASE_UNET, SUPER, files, make_config, tensors

FROZEN = {"lr": 1e-30, "weight_decay": 0.0, "warmup_steps": 0}


@pytest.fixture(scope="module")
def source(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("source")
    train(make_config(store, num_steps=2), out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "taken"), [(None, "ema-0.9"), ("model", "model"), ("ema-0.5", "ema-0.5")])
def test_a_training_starts_with_the_weights_of_another(
    source: Path, store: Path, tmp_path: Path, weights: str | None, taken: str
) -> None:
    config = make_config(
        store, num_steps=1, optimizer=FROZEN, seed=7, init_from={"path": str(source), "weights": weights}
    )
    started = tensors(train(config, tmp_path)["checkpoint"])
    expected = tensors(sorted((source / "checkpoints").iterdir())[-1])
    names = [name.removeprefix("model/") for name in started if name.startswith("model/")]
    for name in names:
        for part in ("model", "ema-0.9", "ema-0.5"):  # the averages begin with them too
            torch.testing.assert_close(started[f"{part}/{name}"], expected[f"{taken}/{name}"], rtol=1e-12, atol=1e-20)
    report = json.loads((tmp_path / "start.json").read_text())
    assert (report["step"], report["weights"], report["loaded"]) == (2, taken, len(names))
    assert (report["left_random"], report["not_used"]) == ([], [])


def test_tensors_that_do_not_fit_are_skipped_and_listed(source: Path, store: Path, tmp_path: Path) -> None:
    other = make_config(
        store, num_steps=1, optimizer=FROZEN, denoiser=SUPER, init_from={"path": str(source), "mismatch": "skip"}
    )
    started = tensors(train(other, tmp_path)["checkpoint"])
    report = json.loads((tmp_path / "start.json").read_text())
    assert "net.conv_in.weight" in report["left_random"]  # reads the low-resolution image too
    assert any("low_res" in name for name in report["left_random"])
    expected = tensors(sorted((source / "checkpoints").iterdir())[-1])
    shared = [n for n in started if n.startswith("model/") and n.removeprefix("model/") not in report["left_random"]]
    assert len(shared) == report["loaded"] > 10
    for name in shared:
        torch.testing.assert_close(started[name], expected[name.replace("model/", "ema-0.9/")], rtol=1e-12, atol=1e-20)


def test_tensors_that_do_not_fit_are_refused_unless_mismatch_is_skip(
    source: Path, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        TrainError, match=r"tensors do not fit \(net\.conv_in\.weight: .* here, .* there.*init_from\.mismatch=skip"
    ):
        train(make_config(store, denoiser=SUPER, init_from={"path": str(source)}), tmp_path)
    fewer = BASE | {"unet": BASE_UNET | {"text_dim": None, "attention_type": "self"}}
    with pytest.raises(TrainError, match=r"init_from\.mismatch=skip"):
        train(make_config(store, denoiser=fewer, text=None, init_from={"path": str(source)}), tmp_path)
    with pytest.raises(TrainError, match=r"init_from\.path: .*absent: has no checkpoint"):
        train(make_config(store, init_from={"path": str(tmp_path / "absent")}), tmp_path)
    assert not (tmp_path / "start.json").exists()


@pytest.mark.slow
def test_a_resumed_run_does_not_load_initial_weights_again(source: Path, store: Path, tmp_path: Path) -> None:
    straight = train(make_config(store, num_steps=4, init_from={"path": str(source)}), tmp_path / "a")
    train(make_config(store, num_steps=2, init_from={"path": str(source)}), tmp_path / "b")
    resumed = train(make_config(store, num_steps=4, init_from={"path": str(tmp_path / "gone")}), tmp_path / "b")
    assert files(resumed["checkpoint"]) == files(straight["checkpoint"])
