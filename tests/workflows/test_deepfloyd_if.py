"""From pipelines of DeepFloyd IF to pipelines of DeepFloyd IF: import, precompute, train, sample, export."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import imagen_core.cascade
from imagen_core.images import to_pixels
from imagen_core.store import Store
from pipeline.config import load_config
from stages.sampling.config import SampleConfig
from stages.sampling.run import prepare
from tests.commands import call, precompute
from tests.deepfloyd import LARGE, SMALL, SameNoise, generators, save_pipelines

pytestmark = pytest.mark.slow
TRAINED = (20, 8)
"""Steps of training of stages I and II."""
PROMPTS = ["a red circle above a blue square", "TWO cats &amp; a dog"]
STEPS = 4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `imported`, the stages of a tiny DeepFloyd IF; `run`, a store that its recipe encoded; both stages
    trained further on it, as `trained-0` and `trained-1`; and `sample.yaml`, which samples from them."""
    folder = tmp_path_factory.mktemp("deepfloyd")
    torch.set_num_threads(1)
    _succeeds("import", "diffusers", *save_pipelines(folder), "--out", str(folder / "imported"))
    encoder = {"name": "t5", "recipe": "deepfloyd-if", "model": str(folder / "imported/text_encoder")}
    encoder |= {"compute_dtype": "float32"}
    settings = {
        "source": {"kind": "synthetic", "num_samples": 24},
        "images": {"sizes_px": [SMALL, LARGE]},
        "encoders": [encoder],
        "store": {"dtype": "float32"},
    }
    (folder / "store.yaml").write_text(yaml.safe_dump(settings))
    assert precompute(folder / "run", "-c", str(folder / "store.yaml")).code == 0
    for stage, steps in enumerate(TRAINED):
        command = ["run", "train", "-c", str(folder / f"imported/unet-{stage}/train.yaml"), "--quiet"]
        more = ["batch_size=4", f"num_steps={steps}", "optimizer.lr=0.001", "optimizer.warmup_steps=1", "ema.rates=[]"]
        more += ["logging.every_steps=1", "checkpoints.every_steps=20", "conditioning_dropout.text=0.3"]
        out = ["--out", str(folder / f"trained-{stage}"), f"store={folder / 'run/store'}", "text=t5"]
        _succeeds(*command, *out, *more)
    sampling = yaml.safe_load((folder / "imported/sample.yaml").read_text())
    for number, stage in enumerate(sampling["stages"]):
        stage["checkpoint"] = str(folder / f"trained-{number}")
        stage["sampling"]["num_steps"] = STEPS
    (folder / "sample.yaml").write_text(yaml.safe_dump(sampling))
    return folder


def _succeeds(*arguments: str) -> None:
    result = call(*arguments)
    assert result.code == 0, f"{' '.join(arguments)}\n{result.out}\n{result.err}"


def test_the_store_has_the_rows_that_if_reads_and_the_empty_caption(work: Path) -> None:
    store = Store.open(work / "run/store")
    assert {len(rows) for index in range(4) for rows in store[index].text["t5"]} == {77}
    assert store.null("t5").shape == (77, 24)


def test_training_with_the_hybrid_loss_lowers_it(work: Path) -> None:
    for stage, steps in enumerate(TRAINED):
        lines = (work / f"trained-{stage}/metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        assert len(losses) == steps
        assert np.mean(losses[-3:]) < (0.8, 0.95)[stage] * np.mean(losses[:3])


@pytest.fixture
def ours(work: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """What the trained cascade samples from the noise of diffusers, by size, in [-1, 1]."""
    monkeypatch.setattr(imagen_core.cascade, "SeededNoise", SameNoise)
    return _sampled(work / "sample.yaml")


def _sampled(path: Path, *overrides: str) -> dict[int, Tensor]:
    prompts = [f"prompts={json.dumps(PROMPTS)}", "device=cpu"]
    requests, session = prepare(load_config(SampleConfig, path, [*prompts, *overrides]))
    session.encode(requests)
    text = session.embeddings.of(requests)
    return session.generate(requests, text, None, strength=1.0, inpaint=None, on_step=lambda *_: None)


def test_the_exported_folder_samples_the_same_images_in_diffusers(
    work: Path, ours: dict[int, Tensor], tmp_path: Path
) -> None:
    encoder = str(work / "imported/text_encoder")
    trained = [str(work / f"trained-{stage}") for stage in (0, 1)]
    _succeeds("export", *trained, "--to", "diffusers", "--out", str(tmp_path / "exported"), "--encoder-model", encoder)
    theirs = _of_diffusers(tmp_path / "exported")
    for size in (SMALL, LARGE):
        torch.testing.assert_close(ours[size], theirs[size].clamp(-1, 1), rtol=0, atol=1e-4)


def _of_diffusers(exported: Path) -> dict[int, Tensor]:
    diffusers = importlib.import_module("diffusers")
    first = diffusers.DiffusionPipeline.from_pretrained(exported / "stage-1")
    parts = {"text_encoder": first.text_encoder, "tokenizer": first.tokenizer}
    second = diffusers.DiffusionPipeline.from_pretrained(exported / "stage-2", **parts)
    small = _call(first, 0)
    return {SMALL: small, LARGE: _call(second, 1, image=small)}


def _call(pipeline: Any, stage: int, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    seeds: Sequence[int] = range(len(PROMPTS))
    noise = generators(seeds, stage)
    return pipeline(PROMPTS, generator=noise, num_inference_steps=STEPS, output_type="pt", **options).images


def test_the_command_writes_these_images(
    work: Path, ours: dict[int, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"prompts={json.dumps(PROMPTS)}", "device=cpu"]
    _succeeds("run", "sample", "-c", str(work / "sample.yaml"), "--out", str(tmp_path / "out"), "--quiet", *prompts)
    for size in (SMALL, LARGE):
        for index, expected in enumerate(to_pixels(ours[size])):
            image = np.asarray(Image.open(tmp_path / f"out/images-{size}/{index:05d}.png"))
            assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1


def test_a_negative_prompt_takes_the_place_of_the_empty_one(work: Path, ours: dict[int, Tensor]) -> None:
    torch.testing.assert_close(_sampled(work / "sample.yaml", "negative_prompt=")[SMALL], ours[SMALL])
    other = _sampled(work / "sample.yaml", "negative_prompt=a blurry photo")
    assert float((other[SMALL] - ours[SMALL]).abs().max()) > 0.01


def test_captions_of_a_store_and_the_empty_one_are_read_from_it(work: Path, tmp_path: Path) -> None:
    captions = json.dumps({"kind": "store", "path": str(work / "run/store"), "num_captions": 2})
    command = ["run", "sample", "-c", str(work / "sample.yaml"), "--out", str(tmp_path / "out"), "--quiet"]
    result = call(*command, f"captions={captions}", "device=cpu", f"encoder_model={tmp_path / 'nowhere'}")
    assert result.code == 0, result.err
    assert "store, text-t5" in result.out
