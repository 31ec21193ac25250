"""Checkpoints: complete or absent, never pickled, and refused by name when damaged or of another model."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_core.models import Conditioning
from imagen_core.sealed import read_sealed
from imagen_core.train import CheckpointError, CheckpointMismatchError, load_checkpoint, train
from imagen_core.train.checkpoints.checkpoint import checkpoints, write_checkpoint
from imagen_core.train.checkpoints.kept import best_checkpoints, record_validation, validation_losses
from tests.imagen_core.train.small import BASE, BASE_UNET, make_config, make_store, tensors


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(make_config(store, num_steps=4), out)
    return out


def newest(out: Path) -> Path:
    return checkpoints(out / "checkpoints")[-1]


def copied(trained: Path, to: Path) -> Path:
    """A copy of the newest checkpoint, to damage."""
    target = to / "checkpoints" / newest(trained).name
    target.mkdir(parents=True)
    for file in newest(trained).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_the_state_names_everything_needed_to_go_on(trained: Path, store: Path) -> None:
    state = json.loads((newest(trained) / "state.json").read_text(encoding="utf-8"))
    assert (state["format"], state["step"], state["samples"], state["ema_updates"]) == (1, 4, 32, 4)
    assert (state["loader"]["epoch"], state["loader"]["position"], state["loader"]["num_samples"]) == (0, 32, 40)
    assert state["encoder"] == {"name": "t5", "dim": 8, "dtype": "float16", "fingerprint": {"model": "tiny"}}
    assert state["config"]["store"] == str(store)
    assert state["denoiser"] == state["config"]["denoiser"]
    assert state["torch"] == torch.__version__
    names = ["ema-0.5.safetensors", "ema-0.9.safetensors", "model.safetensors", "optimizer.safetensors"]
    assert sorted(state["files"]) == names
    assert sorted(path.name for path in newest(trained).iterdir()) == [*names, "state.json"]
    for name, entry in state["files"].items():
        assert entry["bytes"] == (newest(trained) / name).stat().st_size


def test_nothing_is_pickled(trained: Path) -> None:
    for path in newest(trained).iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError)):
            pickle.loads(path.read_bytes())


def test_names_are_the_models_own(trained: Path) -> None:
    names = {name for name in tensors(newest(trained)) if name.startswith("model/")}
    denoiser = make_config(trained).denoiser.unet.build()
    assert names == {f"model/net.{name}" for name in denoiser.state_dict()}


@pytest.mark.parametrize(("weights", "chosen"), [(None, "ema-0.9"), ("ema-0.5", "ema-0.5"), ("model", "model")])
def test_weights_are_chosen_by_name(trained: Path, weights: str | None, chosen: str) -> None:
    loaded = load_checkpoint(trained, weights)
    assert (loaded.weights, loaded.step) == (chosen, 4)
    assert loaded.encoder is not None
    assert loaded.encoder["fingerprint"] == {"model": "tiny"}
    expected = {name: t for name, t in tensors(newest(trained)).items() if name.startswith(f"{chosen}/")}
    for name, values in loaded.denoiser.state_dict().items():
        assert torch.equal(values, expected[f"{chosen}/{name}"])
    assert not loaded.denoiser.training
    assert not any(p.requires_grad for p in loaded.denoiser.parameters())


def test_a_loaded_denoiser_runs(trained: Path) -> None:
    loaded = load_checkpoint(newest(trained))
    x = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    text = torch.randn(2, 3, 8, dtype=torch.float64)
    result = loaded.denoiser(x, torch.ones(2), Conditioning(text=text, text_mask=torch.ones(2, 3, dtype=torch.bool)))
    assert result.shape == x.shape
    assert bool(result.isfinite().all())


def test_unknown_weights_are_refused_with_the_known_ones(trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights 'ema-0.7'; choose from ema-0.5, ema-0.9, model"):
        load_checkpoint(trained, "ema-0.7")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        load_checkpoint(tmp_path)


def damage_tensors(path: Path) -> None:
    file = path / "ema-0.9.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_tensors(path: Path) -> None:
    file = path / "ema-0.9.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def remove_tensors(path: Path) -> None:
    (path / "ema-0.9.safetensors").unlink()


def flip_in_state(path: Path) -> None:
    """Another number of samples, in JSON that is otherwise valid."""
    file = path / "state.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"samples": 32', '"samples": 33'), encoding="utf-8")


def cut_state(path: Path) -> None:
    file = path / "state.json"
    file.write_text(file.read_text(encoding="utf-8")[:200], encoding="utf-8")


def edit_state(path: Path, **changes: Any) -> None:
    """Without its digest, as earlier versions wrote it."""
    file = path / "state.json"
    state = json.loads(file.read_text(encoding="utf-8")) | {"sha256": "(gone)"} | changes
    file.write_text(json.dumps({k: v for k, v in state.items() if v != "(gone)"}), encoding="utf-8")


def edit_loader(path: Path, **changes: Any) -> None:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    edit_state(path, loader=state["loader"] | changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_tensors, r"ema-0.9.safetensors: its checksum .*; no checkpoint before it is intact"),
        (cut_tensors, r"ema-0.9.safetensors: its checksum .*; no checkpoint before it is intact"),
        (remove_tensors, r"ema-0.9.safetensors: is missing; no checkpoint before it is intact"),
        (cut_state, r"state.json: cannot be read .*; no checkpoint before it is intact"),
        (
            lambda path: edit_state(path, loader="(gone)"),
            r"state.json: loader: is missing; no checkpoint before it is intact",
        ),
        (lambda path: edit_state(path, format=2), "has format 2, this version reads 1"),
        (lambda path: edit_state(path, denoiser={"size_px": 3}), "configuration is not valid"),
        (lambda path: (path / "state.json").write_text("[]"), r"state.json: cannot be read"),
        (lambda path: (path / "state.json").write_bytes(b""), r"state.json: cannot be read"),
        (lambda path: (path / "state.json").write_bytes(b'{"a": "\xff"}'), r"state.json: cannot be read .*utf-8"),
        (lambda path: (path / "state.json").unlink(), "has no checkpoint"),
        (flip_in_state, r"state.json: was changed since it was written"),
        (lambda path: edit_state(path, step="four"), r"step: input should be a valid integer \(got 'four'\)"),
        (lambda path: edit_state(path, step=3), r"state.json: is of step 3, and so of another checkpoint"),
        (lambda path: edit_state(path, samples=-1), r"state.json: samples: .*greater than or equal to 0 \(got -1\)"),
        (lambda path: edit_state(path, files=[]), r"state.json: files: input should be a valid dictionary"),
        (lambda path: edit_state(path, files={"model.safetensors": 3}), r"state.json: files.model.safetensors: "),
        (lambda path: edit_state(path, config={"max_tokens": "x"}), r"state.json: config.max_tokens: "),
        (lambda path: edit_state(path, encoder={"name": "t5"}), r"state.json: encoder.dim: is missing"),
        (lambda path: edit_state(path, loader="x"), r"state.json: loader: input should be a valid dictionary"),
        (lambda path: edit_loader(path, position=-8), r"loader: .*position -8, which must be an integer of 0 or more"),
        (lambda path: edit_loader(path, position=41), r"loader: .*position 41 of 40 samples"),
        (lambda path: edit_loader(path, epoch="one"), r"loader: .*epoch 'one', which must be an integer"),
    ],
)
def test_damage_is_named_with_what_to_do(trained: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    path = copied(trained, tmp_path)
    load_checkpoint(path)
    spoil(path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_an_intact_checkpoint_before_a_damaged_one_is_named(store: Path, tmp_path: Path) -> None:
    train(make_config(store, num_steps=3, checkpoints={"every_steps": 1}), tmp_path)
    first, second, third = checkpoints(tmp_path / "checkpoints")
    damage_tensors(third)
    offers = rf"{re.escape(str(second))} is intact: remove {re.escape(str(third))} to resume from it"
    with pytest.raises(CheckpointError, match=offers):
        load_checkpoint(tmp_path)
    cut_state(second)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(first))} is intact"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(first))} is intact"):
        train(make_config(store, num_steps=4), tmp_path)
    shutil.rmtree(third)
    shutil.rmtree(second)
    assert load_checkpoint(tmp_path).step == 1


def test_a_checkpoint_of_an_earlier_version_has_no_digest_of_its_own_and_loads(trained: Path, tmp_path: Path) -> None:
    path = copied(trained, tmp_path)
    edit_state(path)
    assert load_checkpoint(path).step == 4


def test_training_refuses_a_damaged_checkpoint(trained: Path, store: Path, tmp_path: Path) -> None:
    damage_tensors(copied(trained, tmp_path))
    with pytest.raises(CheckpointError, match=r"ema-0.9.safetensors: its checksum"):
        train(make_config(store, num_steps=5), tmp_path)


def test_another_encoder_is_refused_by_field(trained: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", model="large")
    copied(trained, tmp_path)
    with pytest.raises(
        CheckpointMismatchError,
        match=r'another encoder: fingerprint.model: "tiny" -> "large"; train on the store it started with',
    ):
        train(make_config(other, num_steps=5), tmp_path)


def test_another_model_is_refused_by_field(trained: Path, store: Path, tmp_path: Path) -> None:
    copied(trained, tmp_path)
    wider = BASE | {"unet": BASE_UNET | {"embed_dim": 64}}
    with pytest.raises(
        CheckpointMismatchError, match=r"another denoiser: unet.embed_dim: 32 -> 64; train it in another"
    ):
        train(make_config(store, num_steps=5, denoiser=wider), tmp_path)


def test_recomputing_activations_may_be_switched_on_when_memory_runs_out(
    trained: Path, store: Path, tmp_path: Path
) -> None:
    copied(trained, tmp_path)
    recomputing = BASE | {"unet": BASE_UNET | {"activation_checkpointing": True, "checkpointed_parts": ["up"]}}
    assert train(make_config(store, num_steps=5, denoiser=recomputing), tmp_path)["steps"] == 5


def test_a_setting_newer_than_the_checkpoint_counts_as_its_default(trained: Path, store: Path, tmp_path: Path) -> None:
    path = copied(trained, tmp_path)
    denoiser = json.loads((path / "state.json").read_text(encoding="utf-8"))["denoiser"]
    del denoiser["diffusion"]["variance"]
    edit_state(path, denoiser=denoiser)
    assert train(make_config(store, num_steps=5), tmp_path)["steps"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 9}, "loader state has seed 0, this loader has 9"),
        ({"validation": {"num_samples": 5}}, "num_samples 40, this loader has 35"),
    ],
)
def test_another_order_of_samples_is_refused(
    trained: Path, store: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    copied(trained, tmp_path)
    with pytest.raises(Exception, match=message):
        train(make_config(store, num_steps=5, **changes), tmp_path)


def test_a_checkpoint_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"model": {"weight": torch.arange(6.0).reshape(2, 3).T}}
    write_checkpoint(tmp_path, 1, model, {})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 2, model, {})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
    assert torch.equal(tensors(tmp_path / "step-00000001")["model/weight"], model["model"]["weight"])


@pytest.mark.slow
def test_a_checkpoint_has_no_moments_of_parameters_that_are_not_trained(store: Path, tmp_path: Path) -> None:
    unet = {
        "family": "hybrid",
        "image_size_px": 16,
        "dim": 8,
        "dim_mults": [1],
        "num_res_blocks": [1],
        "attention_levels": [False],
        "cross_attention_levels": [False],
        "text_dim": None,
        "unread_caption_parameters": True,
    }
    config = make_config(store, denoiser={"unet": unet, "size_px": 16}, text=None, num_steps=1)
    train(config, tmp_path)
    kept = tensors(newest(tmp_path))
    names = {name.removeprefix("model/") for name in kept if name.startswith("model/")}
    frozen = {name for name in names if ".unread." in name}
    assert frozen
    moments = {name.removeprefix("optimizer/exp_avg.") for name in kept if name.startswith("optimizer/exp_avg.")}
    assert moments == names - frozen
    train(config.model_copy(update={"num_steps": 2}), tmp_path)
    again = tensors(newest(tmp_path))
    assert all(again[f"model/{name}"].equal(kept[f"model/{name}"]) for name in frozen)
    assert not again["model/net.conv_in.convs.0.weight"].equal(kept["model/net.conv_in.convs.0.weight"])


@pytest.mark.parametrize("data", [b"", b'{"step-0000', b"[1]", b"\xff", bytes(9)])
def test_a_damaged_file_of_validation_losses_is_made_again_from_the_metrics(data: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step, loss in ((2, 0.5), (4, 0.7), (6, 0.6)):
        write_checkpoint(folder, step, {}, {})
        record_validation(folder, step, loss, keep=9)
    assert [path.name for path in best_checkpoints(folder)] == ["step-00000002", "step-00000006", "step-00000004"]
    lines = [{"step": step, "loss": 1.0} for step in range(1, 7)]
    lines += [{"step": step, "validation_loss": loss} for step, loss in ((2, 0.5), (4, 0.7), (6, 0.6))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    (tmp_path / "validation.json").write_bytes(data)
    assert [path.name for path in best_checkpoints(folder)] == ["step-00000002", "step-00000006", "step-00000004"]
    record_validation(folder, 6, 0.4, keep=9)
    assert best_checkpoints(folder)[0].name == "step-00000006"
    assert (
        validation_losses(folder)
        == read_sealed(tmp_path / "validation.json")
        == {
            "step-00000002": 0.5,
            "step-00000004": 0.7,
            "step-00000006": 0.4,
        }
    )
