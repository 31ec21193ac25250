"""Every shipped training configuration trains, resumes from its checkpoint, and samples; with a small network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from imagen_core.train import TrainConfig
from pipeline.cli.presets import find_config, list_presets
from pipeline.config import load_config
from tests.commands import call, precompute
from workflows.train import TrainWorkflowConfig

RECIPES = [row["name"] for row in list_presets() if row["workflow"] == "train"]
QUICK = {"minimagen-super-test"}
"""The others are marked slow."""
TEXT_DIM = 64
"""Of tiny-random-t5, which stands for every encoder."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads wait for each other longer than they compute at these sizes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of images of words, their captions and transcriptions, and an image to upsample."""
    folder = tmp_path_factory.mktemp("recipes")
    encoders = [{"name": name, "kind": "t5", "model": "tiny-random-t5"} for name in ("t5", "deberta")]
    settings = {
        "source": {"kind": "synthetic", "num_samples": 8, "scene": "words"},
        "images": {"sizes_px": [4, 8, 16, 32]},
        "encoders": encoders,
    }
    (folder / "store.yaml").write_text(yaml.safe_dump(settings))
    assert precompute(folder / "run", "-c", str(folder / "store.yaml")).code == 0
    Image.new("RGB", (16, 16), (200, 30, 60)).save(folder / "low.png")
    return folder


def reduced(recipe: TrainWorkflowConfig) -> dict[str, Any]:
    """Overrides that shrink images, widths, depths, batches and steps of a recipe, and nothing else."""
    unet, denoiser = recipe.denoiser.network, recipe.denoiser.model_dump()
    size, low = denoiser["size_px"], denoiser["low_res_px"]
    small = 8 if low is None else 16 if recipe.views.crop_px is None else 32
    changes: dict[str, Any] = {
        "denoiser.size_px": small,
        "denoiser.unet.image_size_px": small,
        "validation": {"num_samples": 0},
        "grid.every_steps": "null",
        "batch_size": 2,
        "denoiser.unet.num_res_blocks": 1 if isinstance(unet.num_res_blocks, int) else [1] * len(unet.num_res_blocks),
        "checkpoints": {"every_steps": 1},
        "logging": {"every_steps": 1},
    }
    if low is not None:
        changes["denoiser.low_res_px"] = small * low // size
    if recipe.views.crop_px is not None:
        changes["views.crop_px"] = small // 2
    if recipe.micro_batch_size is not None:
        changes["micro_batch_size"] = 1
    if recipe.online_encoder is not None:
        changes["online_encoder.model"] = "tiny-random-t5"
    if unet.text_dim is not None:
        changes["denoiser.unet.text_dim"] = TEXT_DIM
    if unet.family == "hybrid":
        changes |= {"denoiser.unet.dim": 8, "denoiser.unet.cond_dim": 8, "denoiser.unet.head_dim": 8}
    else:
        changes |= {"denoiser.unet.embed_dim": 32, "denoiser.unet.head_dim": 16}
    if unet.family == "regular":
        resolutions = [small * side // unet.image_size_px for side in unet.attention_resolutions]
        changes |= {"denoiser.unet.attention_resolutions": resolutions, "denoiser.unet.cond_dim": 16}
    return changes


SIZES = {"image_size_px", "text_dim", "dim", "embed_dim", "cond_dim", "head_dim", "attention_resolutions"}
SIZES |= {"num_res_blocks"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_recipe_trains_resumes_and_samples(name: str, run: Path, tmp_path: Path) -> None:
    recipe = load_config(TrainWorkflowConfig, find_config("train", name))
    overrides = [f"{key}={value}" for key, value in reduced(recipe).items()]
    out, last = tmp_path / "out", tmp_path / "out/checkpoints/step-00000002"
    for steps in (1, 2):
        command = ["run", "train", "-c", name, "--out", str(out), "--quiet", f"store={run}/run/store"]
        result = call(*command, *overrides, f"num_steps={steps}")
        assert result.code == 0, result.err
        state = json.loads((out / f"checkpoints/step-0000000{steps}/state.json").read_text())
        assert (state["step"], state["samples"]) == (steps, 2 * steps)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]

    trained = TrainConfig.model_validate(state["config"])
    assert trained.denoiser.diffusion == recipe.denoiser.diffusion
    assert trained.ema == recipe.ema
    assert trained.optimizer == recipe.optimizer
    before, after = recipe.denoiser.network.model_dump(), trained.denoiser.network.model_dump()
    changed = {key for key, value in after.items() if value != before[key]}
    assert changed <= SIZES

    more = [] if trained.denoiser.low_res_px is None else [f"low_res=[{run}/low.png]"]
    stages = [{"checkpoint": str(last), "sampling": {"num_steps": 2}}]
    (tmp_path / "sample.yaml").write_text(yaml.safe_dump({"stages": stages, "device": "cpu"}))
    command = ["run", "sample", "-c", str(tmp_path / "sample.yaml"), "--out", str(tmp_path / "generated"), "--quiet"]
    result = call(*command, "prompts=[a small red circle]", *more)
    assert result.code == 0, result.err
    side = trained.denoiser.size_px
    assert Image.open(tmp_path / f"generated/images-{side}/00000.png").size == (side, side)


@pytest.mark.slow
def test_paddles_base_and_super_resolution_sample_as_the_cascade_that_ships(run: Path, tmp_path: Path) -> None:
    larger = {"denoiser.size_px": 32, "denoiser.low_res_px": 8, "denoiser.unet.image_size_px": 32}
    for name, changes in {"paddle-397m-single": {}, "paddle-sr256-single": larger}.items():
        recipe = load_config(TrainWorkflowConfig, find_config("train", name))
        overrides = [f"{key}={value}" for key, value in (reduced(recipe) | changes).items()]
        command = ["run", "train", "-c", name, "--out", str(tmp_path / name), "--quiet", f"store={run}/run/store"]
        result = call(*command, *overrides, "num_steps=1")
        assert result.code == 0, result.err
    places = [
        f"stages.{k}.checkpoint={tmp_path}/{name}"
        for k, name in enumerate(["paddle-397m-single", "paddle-sr256-single"])
    ]
    steps = [f"stages.{k}.sampling.num_steps=3" for k in (0, 1)]
    command = ["run", "sample", "-c", "paddle-64-256", "--out", str(tmp_path / "generated"), "--quiet", "device=cpu"]
    result = call(*command, *places, *steps, "prompts=[a small red circle]")
    assert result.code == 0, result.err
    for side in (8, 32):
        assert Image.open(tmp_path / f"generated/images-{side}/00000.png").size == (side, side)
    settings = json.loads((tmp_path / "generated/images.json").read_text())["settings"]["stages"]
    assert [stage["sampling"]["sampler"]["kind"] for stage in settings] == ["ancestral", "ancestral"]
    assert [stage["sampling"]["threshold"]["percentile"] for stage in settings] == [0.95, 0.95]
    assert [stage["sampling"]["guidance"]["text"] for stage in settings] == [5.0, 1.0]
