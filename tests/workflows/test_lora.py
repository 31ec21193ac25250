"""An adapter from the command line: trained on a base, sampled with it, exported merged and alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from imagen_core.models import Conditioning
from imagen_core.train import LoraUseConfig, load_checkpoint
from tests.commands import Result, call, precompute
from tests.trained import BASE, train, write_cascade


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade, and `lora`: an adapter of its base, trained for 6 steps that change much."""
    folder = write_cascade(tmp_path_factory.mktemp("lora"))
    write_config(folder, "lora", optimizer={"lr": 0.1, "warmup_steps": 0})
    result = train(folder, "lora", folder / "lora")
    assert result.code == 0, result.err
    return folder


def write_config(folder: Path, name: str, **changes: Any) -> None:
    lora = {"lora": {"rank": 4}, "init_from": {"path": str(folder / "base"), "weights": "model"}}
    config = {"store": str(folder / "run/store"), **BASE, **lora, **changes}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


def sample(out: Path, checkpoint: Path, **stage: Any) -> Result:
    stage = {"checkpoint": str(checkpoint), "sampling": {"num_steps": 2}, **stage}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"stages": [stage], "device": "cpu", "prompts": ["a red disc"]}))
    return call("run", "sample", "-c", str(path), "--out", str(out), "--quiet")


def image(out: Path, checkpoint: Path, **stage: Any) -> np.ndarray:
    result = sample(out, checkpoint, **stage)
    assert result.code == 0, result.err
    (path,) = (out / "images-16").iterdir()
    return np.asarray(Image.open(path)).astype(int)


def test_images_are_of_base_and_adapter_merged_or_apart_and_of_one_exported_file(work: Path, tmp_path: Path) -> None:
    merged, plain = (
        image(tmp_path / "merged", work / "lora"),
        image(tmp_path / "plain", work / "base", weights="model"),
    )
    assert np.abs(merged - plain).max() > 8
    apart = image(tmp_path / "apart", work / "lora", lora={"merge": False})
    assert np.abs(apart - merged).max() <= 1
    none = image(tmp_path / "none", work / "lora", lora={"scale": 0})
    assert np.array_equal(none, plain)
    exported = call("export", str(work / "lora"), "--out", str(tmp_path / "one.safetensors"))
    assert exported.code == 0, exported.err
    assert np.array_equal(image(tmp_path / "one", tmp_path / "one.safetensors"), merged)


def test_a_folder_of_images_without_an_adapter_is_that_of_earlier_versions(work: Path, tmp_path: Path) -> None:
    image(tmp_path / "out", work / "base")
    (stage,) = json.loads((tmp_path / "out/images.json").read_text())["settings"]["stages"]
    assert "lora" not in stage
    other = sample(tmp_path / "out", work / "lora", lora={"scale": 0.5})
    assert other.code == 2
    assert "holds images of other settings" in other.err


def test_the_adapter_alone_is_a_file_that_peft_loads(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter.safetensors"
    command = ("export", str(work / "lora"), "--to", "lora", "--out", str(out), "--weights", "model")
    first = call(*command, "--json")
    assert first.code == 0, first.err
    before = out.read_bytes()
    assert call(*command).code == 0  # the same again is no error
    assert out.read_bytes() == before
    with safe_open(out, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (settings["r"], settings["lora_alpha"]) == (4, 4.0)
    newest = sorted((work / "lora/checkpoints").iterdir())[-1]
    tensors, kept = load_file(out), load_file(newest / "model.safetensors")
    assert tensors.keys() == kept.keys()
    assert all(torch.equal(tensors[name], value) for name, value in kept.items())

    children = torch.nn.ModuleDict({"net": load_checkpoint(work / "base", "model").denoiser.net})
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), children)
    found = peft.set_peft_model_state_dict(children, tensors)
    assert found.unexpected_keys == []
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 3, 16, 16, generator=generator), torch.randn(1, 4, 64, generator=generator)
    given = x, torch.zeros(1), Conditioning(text=text, text_mask=torch.ones(1, 4, dtype=torch.bool))
    expected = load_checkpoint(work / "lora", "model", LoraUseConfig(merge=False)).denoiser.net(*given)
    torch.testing.assert_close(children["net"](*given), expected, rtol=1e-6, atol=1e-6)


def test_a_model_without_an_adapter_has_none_to_export(work: Path, tmp_path: Path) -> None:
    result = call("export", str(work / "base"), "--to", "lora", "--out", str(tmp_path / "a.safetensors"))
    assert (result.code, result.out) == (2, "")
    assert "has no adapter" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_what_is_trained(work: Path) -> None:
    summary = json.loads(call("run", "train", "-c", str(work / "lora.yaml"), "--dry-run", "--json").out)["summary"]
    newest = sorted((work / "lora/checkpoints").iterdir())[-1]
    trained = sum(value.numel() for value in load_file(newest / "model.safetensors").values())
    base = sum(value.numel() for value in load_checkpoint(work / "base").denoiser.state_dict().values())
    assert (summary["parameters"], summary["adapter_parameters"]) == (base, trained)
    assert (summary["gradients_bytes"], summary["optimizer_bytes"]) == (4 * trained, 8 * trained)
    assert summary["weights_bytes"] == 4 * (base + trained)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.targets=[to_nothing]", "lora.targets.0: 'to_nothing' ends the name of no layer"),
        ("lora.rank=0", "lora.rank"),
        ("init_from=null", "lora: is an adapter of a trained model; name it as init_from.path"),
        ("init_from.path=nowhere", "init_from.path: nowhere: has no checkpoint"),
        ("denoiser.unet.embed_dim=64", "tensors do not fit"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(
    work: Path, tmp_path: Path, override: str, words: str
) -> None:
    result = train(work, "lora", tmp_path / "out", override)
    assert result.code == 2
    assert words in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "out/checkpoints").exists()
    if "targets" in override:
        assert words in call("run", "train", "-c", str(work / "lora.yaml"), "--dry-run", override).err


@pytest.mark.slow
def test_a_base_that_was_moved_is_named_in_sampling(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "base", tmp_path / "base")
    write_config(tmp_path, "lora", num_steps=1, store=str(work / "run/store"))
    assert train(tmp_path, "lora", tmp_path / "lora").code == 0
    (tmp_path / "base").rename(tmp_path / "moved")
    lost = sample(tmp_path / "out", tmp_path / "lora")
    assert lost.code == 2
    assert "stages.0.checkpoint: " in lost.err
    assert "as lora.base" in lost.err
    image(tmp_path / "out", tmp_path / "lora", lora={"base": str(tmp_path / "moved")})
    for more in ((), ("--to", "lora")):
        command = ["export", str(tmp_path / "lora"), "--out", str(tmp_path / f"{len(more)}.safetensors"), *more]
        lost = call(*command)
        assert lost.code == 2
        assert "(for `pipeline export`: --lora-base)" in lost.err
        assert call(*command, "--lora-base", str(tmp_path / "moved")).code == 0
    refused = call("export", str(tmp_path / "lora"), "--to", "diffusers", "--out", "x", "--lora-base", "y")
    assert refused.code == 2
    assert "--lora-base: is for exports to one file" in refused.err


@pytest.mark.slow
def test_a_hundred_steps_lower_the_validation_loss(work: Path, tmp_path: Path) -> None:
    assert precompute(tmp_path / "run", "source.num_samples=65", "images.sizes_px=[16]").code == 0
    layers = ["to_q", "to_kv", "context_to_kv", "to_out", "conv1", "conv2", "conv_out"]
    write_config(
        work,
        "longer",
        store=str(tmp_path / "run/store"),
        lora={"rank": 8, "targets": layers},
        optimizer={"lr": 1e-3, "warmup_steps": 0},
        num_steps=100,
        batch_size=4,
        validation={"num_samples": 16, "every_steps": 100},
        checkpoints={"every_steps": 100},
        ema={"rates": [0.9]},
    )
    losses = []
    for steps in (1, 100):
        assert train(work, "longer", tmp_path / "longer", f"num_steps={steps}").code == 0
        losses.append(json.loads((tmp_path / "longer/summary.json").read_text())["summary"]["validation_loss"])
    assert losses[1] < 0.95 * losses[0]
