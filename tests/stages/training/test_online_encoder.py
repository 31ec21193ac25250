"""N25: captions encoded in the training loop give the training that cached embeddings give."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.commands import Result, call, precompute
from tests.trained import BASE, train

ENCODER = {"name": "t5", "kind": "t5", "model": "tiny-random-t5", "compute_dtype": "float32"}
CHECKS = {
    "validation": {"num_samples": 4, "every_steps": 6},
    "grid": {"every_steps": 6, "num_images": 2, "num_steps": 2},
}
CHECKS |= {"logging": {"every_steps": 1}}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 15 scenes with embeddings in float32, a training on it (`cached`), and one on a copy of the store
    without the embeddings (`online`)."""
    folder = tmp_path_factory.mktemp("online")
    settings = {"encoders": [ENCODER], "store": {"dtype": "float32"}, "images": {"sizes_px": [16]}}
    (folder / "store.yaml").write_text(yaml.safe_dump(settings))
    result = precompute(folder / "run", "-c", str(folder / "store.yaml"), "source.num_samples=16")
    assert result.code == 0, result.err
    shutil.copytree(folder / "run/store", folder / "captions")
    shutil.rmtree(folder / "captions/text-t5")
    for name, store, more in (("cached", "run/store", {}), ("online", "captions", {"online_encoder": ENCODER})):
        config = {"store": str(folder / store), **BASE, **CHECKS, **more}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        result = train(folder, name, folder / name)
        assert result.code == 0, result.err
    return folder


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state(out: Path) -> dict:
    return json.loads((sorted((out / "checkpoints").iterdir())[-1] / "state.json").read_text())


@pytest.mark.slow
def test_online_encoding_gives_the_losses_and_weights_of_cached_embeddings(work: Path) -> None:
    cached, online = lines(work / "cached"), lines(work / "online")
    for name in ("loss", "grad_norm", "validation_loss"):
        expected = [line[name] for line in cached if name in line]
        assert expected
        assert [line[name] for line in online if name in line] == pytest.approx(expected, rel=1e-5)
    last = "checkpoints/step-00000006/model.safetensors"
    for name, values in load_file(work / "cached" / last).items():
        np.testing.assert_allclose(load_file(work / "online" / last)[name], values, atol=1e-5)
    assert (work / "online/grids/step-00000006.png").exists()


@pytest.mark.slow
def test_the_checkpoint_names_the_encoder_as_a_cached_one_and_samples(work: Path, tmp_path: Path) -> None:
    assert state(work / "online")["encoder"] == state(work / "cached")["encoder"]
    stages = [{"checkpoint": str(work / "online"), "sampling": {"num_steps": 2}}]
    (tmp_path / "sample.yaml").write_text(yaml.safe_dump({"stages": stages, "device": "cpu"}))
    command = ["run", "sample", "-c", str(tmp_path / "sample.yaml"), "--out", str(tmp_path / "s"), "--quiet"]
    result = call(*command, "prompts=[a red circle]")
    assert result.code == 0, result.err
    assert (tmp_path / "s/images-16/00000.png").exists()


@pytest.mark.slow
def test_an_online_run_resumes_also_from_cached_embeddings_of_the_encoder(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    for name, steps in (("online", 2), ("online", 4), ("cached", 6)):
        result = train(work, name, out, f"num_steps={steps}")
        assert result.code == 0, result.err
    losses = [line["loss"] for line in lines(out) if "loss" in line]
    assert losses == pytest.approx([line["loss"] for line in lines(work / "cached") if "loss" in line], rel=1e-5)


def test_online_encoding_reads_captions_only(work: Path) -> None:
    facts = {name: json.loads(dry_run(work, name).out)["summary"] for name in ("cached", "online")}
    assert facts["cached"]["store_groups_needed"] == ["images-16", "text-t5"]
    assert facts["online"]["store_groups_needed"] == ["images-16"]
    assert facts["online"]["store_now"].startswith("11 samples")


def dry_run(work: Path, name: str) -> Result:
    return call("run", "train", "-c", str(work / f"{name}.yaml"), "--dry-run", "--json")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("online_encoder.name=clip", "the online encoder is named 'clip'"),
        ("denoiser.unet.text_dim=32", "text_dim is 32, but the embeddings of the online encoder are 64 wide"),
        ("online_encoder.model=/nowhere", "/nowhere"),
        ("online_encoder.max_tokens=5", "fingerprint.max_tokens: 128 -> 5"),
    ],
)
def test_an_online_encoder_that_does_not_fit_is_refused(work: Path, override: str, words: str) -> None:
    result = train(work, "online", work / "online", override, "num_steps=7")
    assert result.code in (2, 4)
    assert words in result.err
