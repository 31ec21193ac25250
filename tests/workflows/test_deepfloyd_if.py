"""The commands of docs/how-to/deepfloyd-if.md on tiny pipelines: what is trained here samples alike in diffusers."""

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
from imagen_core.store import Store
from imagen_core.train import load_checkpoint
from pipeline.config import load_config
from stages.sampling.config import SampleConfig
from stages.sampling.run import prepare
from tests.commands import call
from tests.deepfloyd import LARGE, SMALL, SameNoise, generators, save_pipelines
from tests.runs import REPOSITORY
from tests.test_docs import commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PAGE = REPOSITORY / "docs/how-to/deepfloyd-if.md"
TRAINED = {"IF-I": 20, "IF-II": 8}
"""Steps of training of stages I and II."""
PROMPTS = ["a red circle above a blue square", "TWO cats &amp; a dog"]
STEPS = 4
FASTER = [f"stages.{stage}.sampling.num_steps={STEPS}" for stage in (0, 1)] + ["device=cpu"]
HERE = {
    "DeepFloyd/IF-I-M-v1.0": "I",
    "DeepFloyd/IF-II-M-v1.0": "II",
    "source.path=urls.parquet": "source={kind: synthetic, num_samples: 24}",
    "batch_size=256": "batch_size=4",
    "optimizer.lr=0.00001": "optimizer.lr=0.001",
}
"""What stands for the words of the page."""


def on_tiny_models(words: list[str]) -> list[str]:
    """The arguments of a command of the page, with what makes it short."""
    words = [HERE.get(word, word) for word in words[1:] if not word.startswith("num_steps=")]
    if words[:2] == ["run", "precompute"]:
        words += [f"images.sizes_px=[{SMALL},{LARGE}]", "encoders.0.model=IF/text_encoder", "--executor", "inline"]
        words += ["encoders.0.compute_dtype=float32", "store.dtype=float32"]
    elif words[:2] == ["run", "train"]:
        words += [f"num_steps={TRAINED[words[words.index('--out') + 1]]}", "optimizer.warmup_steps=1", "ema.rates=[]"]
        words += ["logging.every_steps=1", "conditioning_dropout.text=0.3"]
    elif words[:2] == ["run", "sample"]:
        words += FASTER
    elif words[0] == "export":
        words += ["--encoder-model", "IF/text_encoder"]
    return words


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands of the page were run."""
    folder = tmp_path_factory.mktemp("deepfloyd")
    torch.set_num_threads(1)
    save_pipelines(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in commands([PAGE]):
            arguments = on_tiny_models(words)
            result = call(*arguments)
            assert result.code == 0, f"{' '.join(arguments)}\n{result.out}\n{result.err}"
    return folder


@pytest.fixture(scope="module")
def ours(work: Path) -> dict[int, Tensor]:
    """What the trained stages sample from the noise of diffusers, by size, in [-1, 1]."""
    return sampled(work)


def sampled(work: Path, *overrides: str, prompts: Sequence[str] = PROMPTS) -> dict[int, Tensor]:
    settings = [f"stages.{number}.checkpoint={work / name}" for number, name in enumerate(TRAINED)]
    settings += [f"prompts={json.dumps(list(prompts))}", *FASTER, *overrides]
    requests, session = prepare(load_config(SampleConfig, work / "IF/sample.yaml", settings))
    session.encode(requests)
    text = session.embeddings.of(requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagen_core.cascade, "SeededNoise", SameNoise)
        return session.generate(
            requests, text, None, strength=1.0, encode_init=False, inpaint=None, on_step=lambda *_: None
        )


def of_diffusers(exported: Path) -> dict[int, Tensor]:
    """What diffusers samples from the exported pipelines."""
    diffusers = importlib.import_module("diffusers")
    first = diffusers.DiffusionPipeline.from_pretrained(exported / "stage-1")
    parts = {"text_encoder": first.text_encoder, "tokenizer": first.tokenizer}
    second = diffusers.DiffusionPipeline.from_pretrained(exported / "stage-2", **parts)
    images: dict[int, Tensor] = {}
    for stage, (size, pipeline) in enumerate(((SMALL, first), (LARGE, second))):
        pipeline.set_progress_bar_config(disable=True)
        more: dict[str, Any] = {"image": images[SMALL]} if stage else {}
        more |= {"generator": generators(range(len(PROMPTS)), stage), "num_inference_steps": STEPS}
        images[size] = pipeline(PROMPTS, output_type="pt", **more).images
    return images


def test_the_exported_pipelines_sample_the_images_of_the_trained_stages(work: Path, ours: dict[int, Tensor]) -> None:
    theirs = of_diffusers(work / "IF-trained")
    for size in (SMALL, LARGE):
        torch.testing.assert_close(ours[size], theirs[size].clamp(-1, 1), rtol=0, atol=1e-4)


def test_training_with_the_hybrid_loss_lowers_it_and_teaches_the_variance(work: Path) -> None:
    for stage, (name, steps) in enumerate(TRAINED.items()):
        losses = [json.loads(line)["loss"] for line in (work / name / "metrics.jsonl").read_text().splitlines()]
        assert len(losses) == steps
        assert np.mean(losses[-3:]) < (0.8, 0.95)[stage] * np.mean(losses[:3])
        before, after = (load_checkpoint(work / place).denoiser.state_dict() for place in (f"IF/unet-{stage}", name))
        last = [key for key, values in before.items() if len(values) == 6 and values.ndim == 4]
        assert len(last) == 1
        moved = (after[last[0]] - before[last[0]]).abs().flatten(1).amax(dim=1)
        assert bool((moved[3:] > 1e-3).all()), "the channels of the variance"


def test_the_store_has_the_rows_that_if_reads_and_the_empty_caption(work: Path) -> None:
    store = Store.open(work / "RUN/store")
    assert {len(rows) for index in range(4) for rows in store[index].text["t5"]} == {77}
    assert store.null("t5").shape == (77, 24)


def test_the_command_to_sample_writes_the_images_of_these_settings(work: Path) -> None:
    sampling = yaml.safe_load((work / "IF/sample.yaml").read_text())["stages"][0]["sampling"]
    assert sampling["guidance"] == {"text": 7.0}
    images = []
    for folder in ("images", "images-after"):
        assert np.asarray(Image.open(work / folder / "images-32/00000.png")).shape == (LARGE, LARGE, 3)
        images.append(np.asarray(Image.open(work / folder / "images-16/00000.png")).astype(int))
    assert np.abs(images[0] - images[1]).max() > 8, "training changed nothing"


def test_a_negative_prompt_takes_the_place_of_the_empty_one(work: Path, ours: dict[int, Tensor]) -> None:
    only_first = f"output.size_px={SMALL}"
    torch.testing.assert_close(sampled(work, "negative_prompt=", only_first)[SMALL], ours[SMALL])
    other = sampled(work, "negative_prompt=a blurry photo", only_first)
    assert float((other[SMALL] - ours[SMALL]).abs().max()) > 0.01


def test_captions_of_a_store_and_the_empty_one_are_read_from_it(work: Path, tmp_path: Path) -> None:
    captions = json.dumps({"kind": "store", "path": str(work / "RUN/store"), "num_captions": 2})
    command = ["run", "sample", "-c", str(work / "IF/sample.yaml"), "--out", str(tmp_path / "out"), "--quiet"]
    trained = f"stages.0.checkpoint={work / 'IF-I'}"
    nowhere = f"encoder_model={tmp_path / 'nowhere'}"
    result = call(*command, trained, f"captions={captions}", nowhere, f"output.size_px={SMALL}", *FASTER)
    assert result.code == 0, result.err
    assert "store, text-t5" in result.out
