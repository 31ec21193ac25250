"""Class labels: from a source to the store, to a training that leaves some out, and to images sampled by class."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from imagen_core.diffusion import Denoiser
from imagen_core.store import Store
from imagen_core.train import TrainConfig, TrainError, train
from imagen_core.train.data.example import make_example
from imagen_core.train.data.store import open_store
from imagen_core.train.evaluation import sample_grid, validation_metrics
from pipeline.errors import ConfigError, StaleOutputError
from stages.evaluation.sweep import with_guidance
from stages.sampling.config import SampleConfig
from stages.sampling.run import prepare
from tests.commands import call, drops
from tests.imagen_core.models.small import random_weights
from tests.imagen_core.train.small import BASE, BASE_UNET, first_batch, make_config, make_context, make_store
from tests.images import plain_png
from tests.runs import precompute

SIZE = ["images.sizes_px=[16]", "encoders=[]"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fourth sample has an unknown class, the others 0, 1, 2."""
    return make_store(tmp_path_factory.mktemp("labels"), row_fields=lambda row: {"label": [None, 0, 1, 2][row % 4]})


def config(store: Path, **changes: Any) -> TrainConfig:
    return make_config(store, denoiser=BASE | {"unet": BASE_UNET | {"num_classes": 3}}, **changes)


def rows(path: Path, labels: list[Any]) -> list[str]:
    """The source options of a parquet file with one image a label."""
    table = [{"image": plain_png(), "caption": f"{i}", "class": label} for i, label in enumerate(labels)]
    pq.write_table(pa.Table.from_pylist(table), path)
    return ["source.kind=parquet", f"source.path={path}", *SIZE]


def test_numbers_come_from_a_column_and_wrong_ones_are_dropped(tmp_path: Path) -> None:
    source = rows(tmp_path / "p.parquet", ["7", "3.0", "-1", "", None, "cat", "1.5", "-2"])
    precompute(tmp_path / "run", *source, "source.label_column=class", "max_drop_fraction=0.9")
    store = Store.open(tmp_path / "run" / "store")
    assert [sample.label for sample in store] == [7, 3, None, None, None]
    assert drops(tmp_path / "run") == [(f"p/{row:07d}", "invalid_label") for row in (5, 6, 7)]
    (batch,) = store.loader(5, labels=True, shuffle=False)
    assert batch["labels"].tolist() == [7, 3, -1, -1, -1]
    assert batch["labels"].dtype == torch.int64
    (batch,) = store.loader(5)
    assert "labels" not in batch
    assert "label      7" in call("inspect", str(tmp_path / "run"), "--key", "p/0000000").out


def test_names_are_numbered_in_the_order_given(tmp_path: Path) -> None:
    source = [*rows(tmp_path / "p.parquet", ["dog", "cat", "dog"]), "source.label_column=class"]
    precompute(tmp_path / "run", *source, "source.class_names=[cat,dog]")
    assert [sample.label for sample in Store.open(tmp_path / "run" / "store")] == [1, 0, 1]
    with pytest.raises(StaleOutputError, match="class_names"):
        precompute(tmp_path / "run", *source, "source.class_names=[dog,cat]")


def test_a_tars_cls_members_are_labels(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for number in range(3):
            for suffix, data in (("cls", b"%d\n" % (5 - number)), ("png", plain_png()), ("txt", b"an image")):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    source = ["source.kind=webdataset", f"source.path={tmp_path / 't.tar'}", "source.label_column=cls", *SIZE]
    precompute(tmp_path / "run", *source)
    assert [sample.label for sample in Store.open(tmp_path / "run" / "store")] == [5, 4, 3]


def test_a_step_reads_the_labels_of_its_samples(store: Path) -> None:
    settings = config(store, conditioning_dropout={"labels": 0})
    batch = first_batch(settings)
    known = {sample.key: -1 if sample.label is None else sample.label for sample in Store.open(store)}
    conditioning = make_example(batch, settings, Denoiser(settings.denoiser), CPU, 0).conditioning
    assert conditioning.labels is not None
    assert conditioning.labels.tolist() == [known[key] for key in batch.keys]
    assert conditioning.labels_keep is not None
    assert conditioning.labels_keep.all()
    none = make_example(batch.part(0, 0), settings, Denoiser(settings.denoiser), CPU, 0).conditioning
    assert none.labels is not None
    assert none.labels.shape == (1,)


def test_labels_are_left_out_apart_from_captions_or_all_conditions_together(store: Path) -> None:
    def kept(**rates: float) -> tuple[torch.Tensor, torch.Tensor]:
        settings = config(store, conditioning_dropout={"text": 0, "labels": 0, **rates})
        batch = first_batch(settings)
        raw = {
            **{name: batch.raw[name].repeat(50, *[1] * (batch.raw[name].ndim - 1)) for name in ("text", "labels")},
            "text_mask": batch.raw["text_mask"].repeat(50, 1),
            "keys": batch.keys * 50,
            "images": {size: pixels.repeat(50, 1, 1, 1) for size, pixels in batch.images.items()},
        }
        many = replace(batch, raw=raw, counters=range(400))
        found = make_example(many, settings, Denoiser(settings.denoiser), CPU, 0).conditioning
        assert found.text_keep is not None
        assert found.labels_keep is not None
        return found.text_keep, found.labels_keep

    captions, labels = kept(text=0.5, labels=0.5)
    for both in (captions & labels, captions & ~labels, ~captions & labels, ~captions & ~labels):
        assert 0.17 < both.double().mean() < 0.33
    captions, labels = kept(all=0.5)
    assert torch.equal(captions, labels)
    assert 0.4 < labels.double().mean() < 0.6


def test_validation_and_grids_leave_no_label_out(store: Path) -> None:
    found = []
    for dropout in (0.0, 0.9):
        settings = config(
            store, conditioning_dropout={"labels": dropout}, validation={"num_samples": 8}, grid={"num_steps": 2}
        )
        denoiser = random_weights(Denoiser(settings.denoiser).double()).eval()
        context = make_context(settings, denoiser)
        found.append((validation_metrics(context), sample_grid(context).tobytes()))
    assert found[0] == found[1]


def test_what_does_not_fit_is_refused(store: Path, tmp_path: Path) -> None:
    plain = make_store(tmp_path / "plain")
    with pytest.raises(TrainError, match=r"num_classes: the store .*plain has no labels; .* source.label_column"):
        open_store(config(plain))
    few = make_config(store, denoiser=BASE | {"unet": BASE_UNET | {"num_classes": 2}}, num_steps=10)
    with pytest.raises(TrainError, match=r"num_classes is 2, but sample '.*' has the label 2; .* the highest \+ 1"):
        train(few, tmp_path / "run")


@pytest.mark.slow
def test_a_trained_model_samples_by_class(store: Path, tmp_path: Path) -> None:
    unet = BASE_UNET | {"num_classes": 3, "text_dim": None, "attention_type": "self"}
    settings = make_config(store, denoiser=BASE | {"unet": unet}, text=None, num_steps=3, precision="float32")
    train(settings, tmp_path / "model")
    weights = load_file(tmp_path / "model/checkpoints/step-00000003/model.safetensors")
    labels = next(value for name, value in weights.items() if "labels.embedding" in name)
    assert labels.shape[0] == 3

    def sampled(name: str, *options: str) -> list[np.ndarray]:
        out = tmp_path / name
        stage = json.dumps([{"checkpoint": str(tmp_path / "model"), "weights": "model", "sampling": {"num_steps": 4}}])
        result = call("run", "sample", "--out", str(out), "--quiet", "device=cpu", f"stages={stage}", *options)
        assert result.code == 0, result.err
        return [np.asarray(Image.open(path)) for path in sorted((out / "images-16").glob("*.png"))]

    config = SampleConfig.model_validate({"stages": [{"checkpoint": str(tmp_path / "model")}], "labels": [0]})
    _, session = prepare(config)
    swept = with_guidance(config.stages, session.cascade, 3.0, "all")
    assert session.with_stages(swept).cascade.stages[0].sampling == swept[0].sampling
    swept = swept[0].sampling.guidance
    assert (swept.labels, swept.text) == (3, 1)

    images = sampled("a", "labels=[0,1,-1]", "seeds=[4,4,4]")
    assert not np.array_equal(images[0], images[1])
    assert np.array_equal(sampled("b", "prompts=[any]", "seeds=[4]")[0], images[2]), "no label is an unknown one"
    record = json.loads((tmp_path / "a/images.json").read_text())
    assert [image["label"] for image in record["images"]] == [0, 1, -1]
    captions = ["captions.kind=store", f"captions.path={store}", "captions.num_captions=4", "seeds=[4,4,4,4]"]
    of_store = sampled("c", *captions)
    kinds = [p["label"] for p in json.loads((tmp_path / "c/images.json").read_text())["images"]]
    assert len(set(kinds)) > 1
    for label, image in zip(kinds, of_store, strict=True):
        if label in (0, 1, -1):
            assert np.array_equal(image, images[label])

    for label in (3, -2):
        result = call(
            "run",
            "sample",
            "-c",
            "demo",
            "--out",
            str(tmp_path / "bad"),
            f"labels=[{label}]",
            "prompts=[]",
            f'stages=[{{"checkpoint": "{tmp_path}/model"}}]',
        )
        assert result.code == ConfigError.exit_code
        assert f"labels: {label} is no class; the stages know 0 to 2" in result.err


def test_a_cascade_without_classes_refuses_labels(tmp_path: Path) -> None:
    settings = make_config(make_store(tmp_path / "store"), num_steps=1, precision="float32")
    train(settings, tmp_path / "model")
    result = call(
        "run",
        "sample",
        "--out",
        str(tmp_path / "out"),
        "prompts=[a]",
        "labels=[1]",
        f'stages=[{{"checkpoint": "{tmp_path}/model"}}]',
    )
    assert result.code == ConfigError.exit_code
    assert "labels: no stage reads them (got 1)" in result.err
