"""Trainings with alignment: what is minimised, exact resume, several processes, what is saved and exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from imagen_core.store import Store
from imagen_core.train import CheckpointMismatchError, TrainError, TrainingStopped, load_checkpoint, train
from imagen_core.train.checkpoints.checkpoint import checkpoints
from tests import tiny_networks
from tests.imagen_core.train.processes import job, launched, newest, report
from tests.imagen_core.train.small import (
    BASE,
    BASE_UNET,
    DIM,
    TRANSFORMER,
    TRANSFORMER_UNET,
    changed,
    files,
    first_batch,
    make_config,
    make_store,
    metrics,
    tensors,
)

FAMILIES: dict[str, tuple[dict[str, Any], int | str]] = {
    "regular": (BASE_UNET, "middle.0"),
    "efficient": (tiny_networks.EFFICIENT | {"text_dim": DIM}, "down.1.blocks.0"),
    "hybrid": (tiny_networks.HYBRID | {"text_dim": DIM}, "middle.0"),
    "transformer": (TRANSFORMER_UNET, 1),
    "class tokens": (TRANSFORMER_UNET | {"time": "token"}, "blocks.1"),
    "checkpointed": (TRANSFORMER_UNET | {"activation_checkpointing": True}, 1),
}
ALIGNMENT = {"encoder": "dino", "block": 1, "hidden_dim": 16}


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("aligned") / "store", features=5)


def config(store: Path, **changes: Any) -> Any:
    return make_config(store, **{"denoiser": TRANSFORMER, "alignment": ALIGNMENT, "num_steps": 3, **changes})


def same(first: str | Path, second: str | Path) -> bool:
    one, other = tensors(first), tensors(second)
    return one.keys() == other.keys() and all(torch.equal(values, other[name]) for name, values in one.items())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_hidden_states_of_every_family_follow_the_features_and_resume_bit_for_bit(
    store: Path, tmp_path: Path, family: str
) -> None:
    unet, block = FAMILIES[family]
    settings = config(
        store,
        denoiser={"unet": unet, "size_px": 16},
        alignment={**ALIGNMENT, "block": block, "weight": 2.0},
        batch_size=4,
    )
    whole = train(settings, tmp_path / "whole")
    train(settings.model_copy(update={"num_steps": 1}), tmp_path / "parts")
    assert same(whole["checkpoint"], train(settings, tmp_path / "parts")["checkpoint"])
    assert all(-1 <= line["alignment"] <= 1 for line in metrics(tmp_path / "whole"))
    without = train(changed(settings, alignment=None), tmp_path / "without")
    first, other = metrics(tmp_path / "whole")[0], metrics(tmp_path / "without")[0]
    assert first["loss"] == other["loss"], "the first step has the same weights, noise and loss"
    assert "alignment" not in other
    changed_weights = tensors(whole["checkpoint"]), tensors(without["checkpoint"])
    name = next(name for name in changed_weights[0] if name.startswith("model/") and "text" not in name)
    assert not torch.equal(changed_weights[0][name], changed_weights[1][name])


def test_the_cosine_grows_and_the_projector_is_in_no_average_and_no_loaded_model(store: Path, tmp_path: Path) -> None:
    settings = config(store, num_steps=12, precision="float32", optimizer={"lr": 5e-3, "warmup_steps": 0})
    train(settings, tmp_path)
    lines = metrics(tmp_path)
    assert np.mean([line["alignment"] for line in lines[-3:]]) > lines[0]["alignment"] + 0.1
    assert np.mean([line["loss"] for line in lines[-3:]]) < lines[0]["loss"]
    saved = tensors(checkpoints(tmp_path / "checkpoints")[-1])
    assert {name.partition("/")[0] for name in saved if "projector" in name} == {"projector", "optimizer"}
    loaded = load_checkpoint(tmp_path).denoiser
    assert not any("projector" in name for name, _ in loaded.named_parameters())


def test_after_until_step_the_network_is_trained_as_without_alignment(store: Path, tmp_path: Path) -> None:
    settings = config(store, num_steps=1)
    train(settings, tmp_path / "a")
    train(settings, tmp_path / "b")
    last = config(store, num_steps=3, alignment={**ALIGNMENT, "until_step": 1})
    train(last, tmp_path / "a")
    train(changed(last, alignment=None), tmp_path / "b")
    assert ["alignment" in line for line in metrics(tmp_path / "a")] == [True, False, False]
    found, expected = (
        {name: values for name, values in tensors(newest(tmp_path / out)).items() if "projector" not in name}
        for out in "ab"
    )
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12)


def test_alignment_may_begin_in_a_resumed_training(store: Path, tmp_path: Path) -> None:
    train(config(store, alignment=None, num_steps=2), tmp_path)
    train(config(store, num_steps=4), tmp_path)
    assert ["alignment" in line for line in metrics(tmp_path)] == [False, False, True, True]


def test_flipped_images_come_with_the_features_of_mirrored_ones(store: Path) -> None:
    settings = config(store, views={"horizontal_flip": 0.5}, batch_size=40)
    batch, plain = first_batch(settings), {sample.key: sample for sample in Store.open(store)}
    flips = 0
    for key, image, features in zip(batch.keys, batch.images[16], batch.raw["features"], strict=True):
        sample = plain[key]
        flipped = not np.array_equal(image.permute(1, 2, 0), sample.images[16])
        if flipped:
            assert np.array_equal(image.permute(1, 2, 0), sample.images[16][:, ::-1])
        flips += flipped
        assert np.array_equal(features, sample.arrays["dino-mirrored" if flipped else "dino"])
    assert 10 < flips < 30


def test_aspect_ratio_buckets_have_grids_of_their_shape(tmp_path: Path) -> None:
    bucketed = make_store(tmp_path / "store", rows=(9, 6), buckets=True, features=5)
    settings = config(bucketed, batch_size=3, num_steps=6, validation={"num_samples": 3, "every_steps": 3})
    whole = train(settings, tmp_path / "whole")
    calls = iter([False, True])
    with pytest.raises(TrainingStopped):
        train(settings, tmp_path / "parts", should_stop=lambda: next(calls))
    assert same(whole["checkpoint"], train(settings, tmp_path / "parts")["checkpoint"])
    batch = first_batch(settings)
    assert batch.raw["features"].shape[1:3] == tuple(side // 4 for side in batch.images[16].shape[2:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_and_resume_bit_for_bit(store: Path, tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {
        "denoiser": TRANSFORMER,
        "alignment": {**ALIGNMENT, "until_step": 3},
        "micro_batch_size": 2,
        "parallel": {"kind": kind},
    }
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    with launched(
        tmp_path,
        [
            job(store, whole, **settings, num_steps=4),
            job(store, parts, **settings, num_steps=2),
            job(store, parts, **settings, num_steps=4),
        ],
    ):
        pass
    assert report(tmp_path, "whole")["error"] is None
    assert files(newest(parts)) == files(newest(whole))
    train(make_config(store, **settings, num_steps=4), tmp_path / "alone")
    alone, shared = tensors(newest(tmp_path / "alone")), tensors(newest(whole))
    assert alone.keys() == shared.keys()
    for name, values in alone.items():
        torch.testing.assert_close(shared[name], values, rtol=1e-6, atol=1e-9)
    lines = [[line.get("alignment") for line in metrics(tmp_path / out)] for out in ("alone", "whole")]
    assert lines[0][:3] == pytest.approx(lines[1][:3], abs=1e-9)
    assert lines[0][3] is lines[1][3] is None


@pytest.mark.slow
def test_a_compiled_network_is_aligned_alike(store: Path, tmp_path: Path) -> None:
    tiny = TRANSFORMER | {"unet": TRANSFORMER_UNET | {"depth": 1}}
    settings = config(store, num_steps=2, batch_size=4, precision="float32", denoiser=tiny)
    train(settings, tmp_path / "plain")
    train(changed(settings, compute={"compile": True}), tmp_path / "compiled")
    plain, compiled = ([line["alignment"] for line in metrics(tmp_path / out)] for out in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize(
    ("alignment", "message"),
    [
        ({"block": 3}, r"alignment\.block: 3 is none of the 2 blocks"),
        (
            {"block": "middle.0"},
            r"'middle\.0' is no block of the network; name one of blocks\.0, blocks\.1 or a number",
        ),
        ({"encoder": "clip"}, r"alignment\.encoder: array 'clip' is not in the store.*precompute"),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    store: Path, tmp_path: Path, alignment: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError, match=message):
        train(config(store, alignment={**ALIGNMENT, **alignment}), tmp_path)


def test_a_unet_names_its_blocks(store: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TrainError, match=r"block: 8 is no block of the network; name one of down\.0\.blocks\.0, .*middle\.0"
    ):
        train(config(store, denoiser=BASE, alignment={**ALIGNMENT, "block": 8}), tmp_path)


def test_flips_without_mirrored_features_and_crops_are_refused(tmp_path: Path) -> None:
    plain = make_store(tmp_path / "store", rows=(9,), features=5, mirrored=False)
    with pytest.raises(TrainError, match=r"views\.horizontal_flip: the store .* has no array dino-mirrored"):
        train(config(plain, views={"horizontal_flip": True}), tmp_path / "out")
    with pytest.raises(ValidationError, match=r"views\.resized_crop: alignment reads features of whole images"):
        config(plain, views={"resized_crop": {"from_px": 32}})


def test_a_configuration_without_alignment_is_recorded_as_before(store: Path) -> None:
    assert "alignment" not in config(store, alignment=None).model_dump(mode="json")


def test_a_training_does_not_resume_with_features_of_another_encoder(store: Path, tmp_path: Path) -> None:
    train(config(store, num_steps=2), tmp_path)
    newest_state = Path(newest(tmp_path)) / "state.json"
    record = json.loads(newest_state.read_text())
    assert record["teacher"]["fingerprint"] == Store.open(str(store)).array_group("dino").fingerprint
    other = make_store(tmp_path / "other", features=6)
    with pytest.raises(CheckpointMismatchError, match=r"another image encoder of its alignment: features: .*6"):
        train(config(other, num_steps=4), tmp_path)
    train(config(store, num_steps=4, alignment=None), tmp_path)
