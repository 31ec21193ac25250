"""A cascade of patch transformers from the command line: planned, trained, sampled, adapted and exported."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.config import load_config
from tests.commands import call, precompute
from tests.runs import REPOSITORY
from tests.test_docs import commands
from tests.trained import COMMON, train
from workflows.train import TrainWorkflowConfig

pytestmark = pytest.mark.timeout(1200)
PAGE = REPOSITORY / "docs/how-to/patch-transformer.md"
UNET = {
    "family": "transformer",
    "image_size_px": 16,
    "patch_px": 4,
    "bottleneck_dim": 12,
    "dim": 32,
    "depth": 2,
    "num_heads": 2,
    "text_dim": 64,
}
BASE = {"denoiser": {"size_px": 16, "unet": UNET}, **COMMON}
SUPER = {
    "denoiser": {
        "size_px": 32,
        "low_res_px": 16,
        "low_res_noise": {"kind": "lognormal"},
        "unet": UNET | {"image_size_px": 32, "patch_px": 8, "low_res": True, "low_res_noise": True, "time": "shared"},
    },
    "views": {"crop_px": 16},
    **COMMON,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store `run`, a base `base` (16 px), `sr` (16 -> 32 px) and `lora`, an adapter of the base."""
    folder = tmp_path_factory.mktemp("transformer")
    assert precompute(folder / "run", "source.num_samples=24", "images.sizes_px=[16,32]").code == 0
    adapter = BASE | {"lora": {"rank": 2}, "init_from": {"path": str(folder / "base"), "weights": "model"}}
    for name, config in (("base", BASE), ("sr", SUPER), ("lora", adapter)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"store": str(folder / "run/store"), **config}))
        result = train(folder, name, folder / name)
        assert result.code == 0, result.err
    return folder


@pytest.mark.slow
def test_a_cascade_of_two_samples_every_stage_and_adapters_change_the_base(work: Path, tmp_path: Path) -> None:
    images = {}
    for name in ("base", "lora"):
        stages = [{"checkpoint": str(work / part), "sampling": {"num_steps": 2}} for part in (name, "sr")]
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump({"stages": stages, "device": "cpu", "prompts": ["a red disc", "a blue square"]})
        )
        result = call("run", "sample", "-c", str(path), "--out", str(tmp_path / name), "--quiet")
        assert result.code == 0, result.err
        for size in (16, 32):
            found = [np.asarray(Image.open(file)) for file in sorted((tmp_path / name / f"images-{size}").iterdir())]
            assert [each.shape for each in found] == [(size, size, 3)] * 2
        images[name] = found[0].astype(int)
    assert np.abs(images["base"] - images["lora"]).max() > 0


@pytest.mark.slow
def test_a_training_is_planned_without_data(work: Path) -> None:
    result = call("run", "train", "-c", str(work / "sr.yaml"), "--dry-run")
    assert result.code == 0, result.err
    assert "activations" in result.out
    listed = call("config", "ls", "--json")
    assert {"jit_b_16", "prx_pixel"} <= {row["name"] for row in json.loads(listed.out)}


def test_the_commands_of_the_page_are_valid_configurations() -> None:
    shown = [
        load_config(TrainWorkflowConfig, {}, [word for word in words[3:] if "=" in word]) for words in commands([PAGE])
    ]
    assert [config.denoiser.network.family for config in shown] == ["transformer"] * 2  # type: ignore[union-attr]


@pytest.mark.slow
def test_it_is_exported_as_one_file_and_as_a_folder_for_diffusers(work: Path, tmp_path: Path) -> None:
    one = call("export", str(work / "base"), "--out", str(tmp_path / "one.safetensors"))
    assert one.code == 0, one.err
    folder = call(
        "export", "--to", "diffusers", str(work / "base"), str(work / "sr"), "--out", str(tmp_path / "folder")
    )
    assert folder.code == 0, folder.err
    assert (tmp_path / "folder/stage_2/config.json").exists()


@pytest.mark.slow
def test_settings_that_do_not_fit_are_one_line(work: Path) -> None:
    config = ("run", "train", "-c", str(work / "base.yaml"), "--out", str(work / "new"))
    result = call(*config, "denoiser.unet.patch_px=5")
    assert result.code == 2
    assert "image_size_px 16 must be a multiple of patch_px 5" in result.err
    assert not (work / "new").exists()
