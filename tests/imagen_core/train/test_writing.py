"""Transcriptions in training: what a step reads of them, and which are left out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_core.diffusion import Denoiser
from imagen_core.models.conditioning.characters import character_ids
from imagen_core.store import Store
from imagen_core.train import TrainConfig, TrainError, train
from imagen_core.train.data.example import make_example
from imagen_core.train.data.store import open_store
from imagen_core.train.evaluation import sample_grid, validation_metrics
from tests.imagen_core.models.small import random_weights
from tests.imagen_core.train.small import BASE, BASE_UNET, first_batch, make_config, make_context, make_store, tensors

CPU = torch.device("cpu")
WRITING = {"dim": 16, "depth": 1, "head_dim": 8, "max_characters": 4, "resolutions": [8], "gain": 0.5}


def text(row: int) -> str | None:
    return [None, "", f"W{row}", f"wörter {row}"][row % 4]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("writing"), row_fields=lambda row: {"transcription": text(row)})


def config(store: Path, **changes: Any) -> TrainConfig:
    return make_config(store, denoiser=BASE | {"unet": BASE_UNET | {"transcription": WRITING}}, **changes)


def test_a_step_reads_the_characters_of_its_samples_and_truncates_long_ones(store: Path) -> None:
    settings = config(store, conditioning_dropout={"transcription": 0})
    batch = first_batch(settings)
    written = {sample.key: sample.transcription or "" for sample in Store.open(store)}
    assert batch.raw["transcriptions"] == [written[key] for key in batch.keys]
    conditioning = make_example(batch, settings, Denoiser(settings.denoiser), CPU, 0).conditioning
    truncated = ["wör" if t.startswith("wör") else t for t in batch.raw["transcriptions"]]
    assert conditioning.characters is not None
    assert torch.equal(conditioning.characters, character_ids(truncated, 4))
    assert conditioning.characters_keep is not None
    assert conditioning.characters_keep.all()
    part = batch.part(2, 5)
    assert part.raw["transcriptions"] == batch.raw["transcriptions"][2:5]
    none = make_example(batch.part(0, 0), settings, Denoiser(settings.denoiser), CPU, 0).conditioning
    assert none.characters is not None
    assert none.characters.tolist() == [[0]]


def test_transcriptions_are_left_out_apart_from_captions_by_named_numbers(store: Path) -> None:
    settings = config(store, conditioning_dropout={"transcription": 0.5, "text": 0.5})
    batch = replace(first_batch(settings), counters=range(400))
    raw = {
        "keys": batch.keys * 50,
        "images": {size: pixels.repeat(50, 1, 1, 1) for size, pixels in batch.images.items()},
        "text": batch.raw["text"].repeat(50, 1, 1),
        "text_mask": batch.raw["text_mask"].repeat(50, 1),
        "transcriptions": batch.raw["transcriptions"] * 50,
    }
    many = replace(batch, raw=raw)
    denoiser = Denoiser(settings.denoiser)
    full = make_example(many, settings, denoiser, CPU, 0).conditioning
    captions, characters = full.text_keep, full.characters_keep
    assert captions is not None
    assert characters is not None
    for both in (captions & characters, captions & ~characters, ~captions & characters, ~captions & ~characters):
        assert 0.17 < both.double().mean() < 0.33
    part = make_example(many.part(100, 150), settings, denoiser, CPU, 9).conditioning
    assert part.characters_keep is not None
    assert torch.equal(part.characters_keep, characters[100:150])


def test_a_compiled_network_sees_few_lengths(store: Path) -> None:
    settings = config(store, compute={"compile": True})
    lengths = set()
    for length in range(5):
        batch = first_batch(settings)
        batch = replace(batch, raw={**batch.raw, "transcriptions": ["x" * length] * 8})
        ids = make_example(batch, settings, Denoiser(settings.denoiser), CPU, 0).conditioning.characters
        assert ids is not None
        lengths.add(ids.shape[1])
    assert lengths == {1, 2, 3, 4}


def test_training_changes_the_encoder(store: Path, tmp_path: Path) -> None:
    train(config(store, num_steps=3, checkpoints={"every_steps": 1}), tmp_path / "a")
    before, after = (tensors(tmp_path / "a" / "checkpoints" / f"step-0000000{step}") for step in (1, 3))
    names = [name for name in before if name.startswith("model/") and "inputs.transcription." in name]
    assert len(names) > 10
    changed = {name for name in names if not torch.equal(before[name], after[name])}
    assert {name.split(".")[3] for name in changed} >= {"characters", "places", "time", "bias", "layers"}


@pytest.mark.slow
def test_validation_and_grids_read_all_transcriptions(store: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", row_fields=lambda row: {"transcription": "O"})
    found = []
    for folder, dropout in ((store, 0.0), (store, 0.9), (other, 0.0)):
        settings = config(
            folder,
            conditioning_dropout={"transcription": dropout},
            validation={"num_samples": 8},
            grid={"num_steps": 2},
        )
        denoiser = random_weights(Denoiser(settings.denoiser).double()).eval()
        context = make_context(settings, denoiser)
        found.append((validation_metrics(context), sample_grid(context).tobytes()))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    assert found[0][1] != found[2][1]


def test_a_model_without_them_reads_none(store: Path) -> None:
    settings = make_config(store)
    batch = first_batch(settings)
    assert "transcriptions" not in batch.raw
    assert make_example(batch, settings, Denoiser(settings.denoiser), CPU, 0).conditioning.characters is None


def test_a_store_without_transcriptions_is_refused(tmp_path: Path) -> None:
    plain = make_store(tmp_path / "plain")
    with pytest.raises(TrainError, match=r"plain has no transcriptions; .* source.transcription_column"):
        open_store(config(plain))
