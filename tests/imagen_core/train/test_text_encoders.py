"""A training that reads the tokens of two text encoders of its store."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from imagen_core.cascade import Cascade, CascadeStage, SamplingConfig
from imagen_core.store import Store
from imagen_core.train import CheckpointMismatchError, OnlineEncoder, TrainConfig, TrainError, load_checkpoint, train
from imagen_core.train.checkpoints.single_file import write_model
from imagen_core.train.data.example import make_example
from imagen_core.train.data.stores import open_stores
from tests.imagen_core.train.processes import job, launched
from tests.imagen_core.train.small import (
    ALONE,
    BASE_UNET,
    DIM,
    changed,
    first_batch,
    make_config,
    make_store,
    metrics,
    tensors,
)

CLIP = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("two") / "store", more_encoders={"clip": CLIP})


def two(store: Path | None, unet: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    settings = {"denoiser": {"size_px": 16, "unet": BASE_UNET | {"text_dim": [DIM, CLIP]} | (unet or {})}}
    return make_config(store, **settings, **{"text": ["t5", "clip"], **changes})


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of six steps that was not interrupted."""
    out = tmp_path_factory.mktemp("six") / "out"
    train(two(store), out)
    return out


def test_a_loader_gives_the_tokens_of_each_encoder_as_a_loader_of_it_alone_does(store: Path) -> None:
    opened = Store.open(store)
    options: dict[str, Any] = {"batch_size": 7, "seed": 3, "max_tokens": 4}
    alone = {name: opened.loader(text=name, **options) for name in ("t5", "clip")}
    for batch, t5, clip in zip(opened.loader(text=["clip", "t5"], **options), alone["t5"], alone["clip"], strict=True):
        assert [*batch["text"]] == [*batch["text_mask"]] == ["clip", "t5"]
        for name, one in (("t5", t5), ("clip", clip)):
            assert batch["keys"] == one["keys"]
            assert torch.equal(batch["text"][name], one["text"])
            assert torch.equal(batch["text_mask"][name], one["text_mask"])
    only = next(iter(opened.loader(text=["clip"], **options)))
    assert only["text"]["clip"].shape == (7, 3, CLIP)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": []}, "name one encoder or several, each once"),
        ({"text": ["t5", "t5"]}, "name one encoder or several, each once"),
        ({"text": ["t5", "bert"]}, "encoder 'bert' is not in the store"),
        ({"text": ["t5", "clip"], "text_layers": [1]}, r"give them by encoder, such as {t5: \[1\]}"),
        ({"text": ["t5", "clip"], "text_layers": {"bert": [1]}}, "text_layers name the encoder 'bert'"),
        ({"text": ["t5", "clip"], "text_layers": {"t5": [1]}}, r"layers \[1\] cannot be read"),
        ({"caption_sets": {"original": 1.0}}, "no caption is loaded; load captions, text or text_embed"),
        ({"image_embed": None, "images": [16], "caption_sets": {"x": 1.0}}, "caption_sets are {'x': 1.0}, but"),
    ],
)
def test_a_loader_refuses_what_does_not_fit_together(store: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Store.open(store).loader(batch_size=2, **options)


def test_the_conditioning_of_a_step_has_both_encoders(store: Path) -> None:
    config = two(store, conditioning_dropout={"text": 0.5})
    batch = first_batch(config)
    found = make_example(batch, config, None, ALONE.device, step=0).conditioning  # pyright: ignore
    assert [t.shape[2] for t in found.text] == [DIM, CLIP]
    for name, text, mask in zip(("t5", "clip"), found.text, found.text_mask, strict=True):
        assert torch.equal(text, batch.raw["text"][name].double())
        assert torch.equal(mask, batch.raw["text_mask"][name])
    assert found.text_keep is not None
    assert 0 < found.text_keep.sum() < 8
    compiled = changed(config, compute={"compile": True}, max_tokens=8)
    padded = make_example(batch, compiled, None, ALONE.device, step=0).conditioning  # pyright: ignore
    assert [t.shape[1] for t in padded.text] == [6, 4], "quarters of max_tokens"
    assert [m.shape[1] for m in padded.text_mask] == [6, 4]
    assert not padded.text[1][:, 3:].any()
    part = batch.part(2, 5)
    assert torch.equal(part.raw["text"]["clip"], batch.raw["text"]["clip"][2:5])


def test_it_trains_and_resumes_exactly(store: Path, trained: Path, tmp_path: Path) -> None:
    train(two(store, num_steps=3), tmp_path / "parts")
    resumed = train(two(store), tmp_path / "parts")
    expected = tensors(trained / "checkpoints/step-00000006")
    found = tensors(resumed["checkpoint"])
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    projections = {name for name in found if "text_layers.projections" in name}
    assert {name.split(".projections.")[1][0] for name in projections} == {"0", "1"}


@pytest.mark.slow
def test_it_trains_in_micro_batches_with_validation_and_grids(store: Path, tmp_path: Path) -> None:
    more = {"validation": {"num_samples": 8, "every_steps": 2}, "grid": {"every_steps": 2, "num_steps": 2}}
    train(two(store, num_steps=2, micro_batch_size=3, **more), tmp_path / "more")
    assert "validation_loss" in metrics(tmp_path / "more")[-1]
    assert [*(tmp_path / "more").rglob("*.png")]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_as_one_does_replicated_and_sharded(store: Path, trained: Path, tmp_path: Path) -> None:
    changes = two(store, micro_batch_size=3).model_dump(mode="json", exclude={"store", "parallel"})
    kinds = ("ddp", "fsdp2")
    with launched(tmp_path, [job(store, tmp_path / kind, **changes, parallel={"kind": kind}) for kind in kinds]):
        pass
    expected = tensors(trained / "checkpoints/step-00000006")
    for kind in kinds:
        found = tensors(tmp_path / kind / "checkpoints/step-00000006")
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-10)


@pytest.mark.slow
def test_it_lowers_its_loss(store: Path, tmp_path: Path) -> None:
    fast = {"optimizer": {"lr": 2e-3, "warmup_steps": 5}, "precision": "float32", "data": {"samples": [0, 8]}}
    train(two(store, num_steps=60, conditioning_dropout={"text": 0.1}, **fast), tmp_path / "out")
    losses = [line["loss"] for line in metrics(tmp_path / "out")]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["efficient", "hybrid"])
def test_every_family_trains(store: Path, tmp_path: Path, family: str) -> None:
    unets = {
        "efficient": {"embed_dim": 32, "channel_mult": [1, 1], "num_res_blocks": [1, 1], "head_dim": 16,
                      "attention_levels": [False, True]},
        "hybrid": {"dim": 16, "dim_mults": [1, 2], "num_res_blocks": [1, 1], "attention_levels": [False, True],
                   "cross_attention_levels": [False, True], "num_heads": 2, "head_dim": 8, "max_text_tokens": 16},
    }  # fmt: skip
    unet = {"family": family, "image_size_px": 16, "low_res": False, "text_dim": [DIM, CLIP], **unets[family]}
    config = make_config(store, denoiser={"size_px": 16, "unet": unet}, text=["t5", "clip"], num_steps=3, max_tokens=8)
    train(config, tmp_path / "parts")
    train(changed(config, num_steps=6), tmp_path / "parts")
    train(changed(config, num_steps=6), tmp_path / "whole")
    parts, whole = (tensors(tmp_path / name / "checkpoints/step-00000006") for name in ("parts", "whole"))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], values) for name, values in whole.items())


def test_a_checkpoint_records_both_encoders_and_refuses_another_of_either(
    store: Path, trained: Path, tmp_path: Path
) -> None:
    loaded = load_checkpoint(trained)
    assert isinstance(loaded.encoder, list)
    assert [(one["name"], one["dim"]) for one in loaded.encoder] == [("t5", DIM), ("clip", CLIP)]
    write_model(tmp_path / "model.safetensors", loaded)
    again = load_checkpoint(tmp_path / "model.safetensors")
    assert again.encoder == loaded.encoder
    assert again.denoiser.config == loaded.denoiser.config
    other = make_store(tmp_path / "other", model="another", more_encoders={"clip": CLIP})
    with pytest.raises(CheckpointMismatchError, match=r'another encoder: fingerprint.model: "tiny" -> "another"'):
        train(two(other, num_steps=8), trained)
    swapped = make_store(tmp_path / "swapped", more_encoders={"clip": CLIP, "bert": CLIP})
    with pytest.raises(CheckpointMismatchError, match='name: "clip" -> "bert"'):
        train(two(swapped, text=["t5", "bert"], num_steps=8), trained)
    with pytest.raises(CheckpointMismatchError, match=r"another denoiser: unet.text_dim"):
        train(two(store, {"text_dim": DIM}, text="t5", num_steps=8), trained)


@pytest.mark.parametrize(
    ("unet", "changes", "message"),
    [
        ({"text_dim": DIM}, {}, r"text is \['t5', 'clip'\], but denoiser.unet.text_dim is 8; give one width"),
        ({"text_dim": [DIM]}, {}, r"text_dim is \[8\]; give one width for one encoder, or a list"),
        ({}, {"text": "t5"}, r"text is 't5', but denoiser.unet.text_dim is \[8, 6\]"),
        ({}, {"text": None}, "set both, or null both"),
        ({}, {"text": ["t5", "t5"]}, "name one encoder or several, each once"),
        ({}, {"text_layers": [1]}, "give them by encoder"),
        (
            {"num_text_layers": [None, 2]},
            {"text_layers": {"clip": [1]}},
            r"of 'clip' are \[1\], but denoiser.unet.num_text_layers.1 is 2; set .*num_text_layers=\[null,1\]",
        ),
    ],
)
def test_settings_of_other_encoders_than_the_model_reads_are_refused(
    unet: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        two(Path("store"), unet, **changes)


@pytest.mark.parametrize(
    ("unet", "changes", "message"),
    [
        ({"text_dim": [DIM, 5]}, {}, r"denoiser.unet.text_dim.1 is 5, .*'clip' in the store are 6 wide; set .*.1=6"),
        ({}, {"text": ["t5", "bert"]}, r"text.1: the store has no encoder 'bert' \(encoders: \['clip', 't5'\]\)"),
        (
            {"num_text_layers": [None, 2]},
            {},
            r"layers.1 is 2, but the store .* set .*text_layers=\[null,null\]",
        ),
    ],
)
def test_a_store_that_lacks_what_the_model_reads_is_refused(
    store: Path, unet: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError, match=message):
        open_stores(two(store, unet, **changes))


def test_captions_without_a_model_that_reads_them_and_online_encoding_of_several_are_refused(store: Path) -> None:
    without = {"text_dim": None, "attention_type": "self"}
    with pytest.raises(ValidationError, match="captions: the model reads no captions; leave it out"):
        two(store, without, text=None, captions={"original": 1.0})
    online = OnlineEncoder({"name": "t5", "dim": DIM}, lambda: lambda captions: [])
    with pytest.raises(TrainError, match="online_encoder: encodes the captions for one encoder, but text is"):
        online.check(two(store))


def test_stores_are_mixed_only_if_both_encoders_are_the_same(store: Path, tmp_path: Path) -> None:
    same = make_store(tmp_path / "same", more_encoders={"clip": CLIP})
    shares = [{"path": str(store), "name": "a"}, {"path": str(same), "name": "b"}]
    train(two(None, stores=shares, num_steps=2), tmp_path / "out")
    other = make_store(tmp_path / "other", model="another", more_encoders={"clip": CLIP})
    with pytest.raises(TrainError, match=r"store b: its text-t5 is not made as that of store a: fingerprint.model"):
        open_stores(two(None, stores=[shares[0], {"path": str(other), "name": "b"}]))
    lacks = make_store(tmp_path / "lacks")
    with pytest.raises(TrainError, match=r"text\.1: the store has no encoder 'clip'"):
        open_stores(two(None, stores=[shares[0], {"path": str(lacks), "name": "b"}]))


@pytest.mark.slow
def test_a_cascade_gives_each_stage_the_encoders_it_was_trained_on(store: Path, trained: Path, tmp_path: Path) -> None:
    """A base of both encoders, and a super-resolution model of the second alone."""
    large = BASE_UNET | {"image_size_px": 32, "low_res": True, "text_dim": CLIP}
    settings = {"denoiser": {"unet": large, "size_px": 32, "low_res_px": 16}, "text": "clip", "num_steps": 2}
    train(make_config(store, **settings), tmp_path / "sr")
    base, upsampler = load_checkpoint(trained), load_checkpoint(tmp_path / "sr")
    sampling = SamplingConfig(num_steps=2, guidance={"text": 2.0})
    first, second = CascadeStage(base.denoiser, sampling), CascadeStage(upsampler.denoiser, sampling)
    text = {name: Store.open(store)[3].text[name] for name in ("t5", "clip")}
    both = Cascade([replace(first, encoders=("t5", "clip")), replace(second, encoders=("clip",))], base.encoder)
    images = both.sample(text, [5], dtype=torch.float64)
    alone = Cascade([first], base.encoder).sample(text, [5], dtype=torch.float64)
    assert torch.equal(images[16], alone[16])
    seen = _seen_text(upsampler.denoiser)
    both.sample(text, [5], dtype=torch.float64)
    assert {tuple(each.shape) for each in seen} == {(2, len(text["clip"][0]), CLIP)}, "with and without caption"
    assert torch.equal(seen[0][0], torch.from_numpy(text["clip"][0]).double())
    other = both.sample({**text, "t5": [-text["t5"][0]]}, [5], dtype=torch.float64)
    assert not torch.equal(other[16], images[16])
    with pytest.raises(ValueError, match=r"text: give the embeddings by encoder, of t5, clip \(got a list\)"):
        both.sample(text["t5"], [5])
    with pytest.raises(ValueError, match=r"of t5, clip \(got t5\)"):
        both.sample({"t5": text["t5"]}, [5])
    assert both.sample(None, [5], dtype=torch.float64)[32].isfinite().all()
    assert isinstance(base.encoder, list)
    with pytest.raises(ValueError, match="but one is read; give a list"):
        Cascade([first], base.encoder[0]).sample(text, [5])


def _seen_text(denoiser: torch.nn.Module) -> list[Any]:
    seen: list[Any] = []
    denoiser.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2].text))  # pyright: ignore
    return seen
