"""Flow matching through the command line: a base and a super-resolution model, and images from both."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.commands import call, precompute
from tests.trained import BASE, SUPER, train

SCHEDULE = {"kind": "flow", "mean": 0.8, "std": 0.8, "noise_scale": 2.0}
DIFFUSION = {
    "base": {"schedule": SCHEDULE, "objective": "x0", "loss_space": "velocity", "velocity_min_t": 0.05},
    "sr": {"schedule": {"kind": "flow", "shift_from_px": 16, "size_px": 32}, "objective": "velocity"},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, and two stages trained on it."""
    folder = tmp_path_factory.mktemp("flow")
    assert precompute(folder / "run", "source.num_samples=24", "images.sizes_px=[16,32]").code == 0
    for (name, diffusion), config in zip(DIFFUSION.items(), (BASE, SUPER), strict=True):
        denoiser = {**config["denoiser"], "diffusion": diffusion}  # type: ignore[dict-item]
        changed = {
            **config,
            "store": str(folder / "run/store"),
            "denoiser": denoiser,
            "grid": {"every_steps": 6, "num_images": 2, "num_steps": 2},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(changed))
        result = train(folder, name, folder / name)
        assert result.code == 0, result.err
    return folder


def sample(work: Path, out: Path, *more: str) -> list[np.ndarray]:
    """The images of 32 px."""
    sampling = {"sampler": {"kind": "heun"}, "grid": {"kind": "uniform"}, "num_steps": 4}
    stages = [{"checkpoint": str(work / name), "sampling": sampling} for name in DIFFUSION]
    result = call("run", "sample", "--out", str(out), "--quiet", f"stages={json.dumps(stages)}", "seed=1", *more)
    assert result.code == 0, result.err
    return [np.asarray(Image.open(path)) for path in sorted((out / "images-32").glob("*.png"))]


@pytest.mark.slow
def test_losses_are_finite_and_grids_are_sampled(work: Path) -> None:
    for name in DIFFUSION:
        lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
        assert list((work / name).rglob("*.png"))


@pytest.mark.slow
def test_a_cascade_generates_an_image_for_each_prompt(work: Path, tmp_path: Path) -> None:
    first, second = sample(work, tmp_path / "out", "prompts=[a red circle,a blue square]")
    assert first.shape == (32, 32, 3)
    assert first.std() > 5
    assert not np.array_equal(first, second)


@pytest.mark.slow
def test_an_image_may_be_the_start(work: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 30, 60)).save(tmp_path / "red.png")
    for encode in ("false", "true"):
        start = ("prompts=[a red circle]", f"init.images=[{tmp_path / 'red.png'}]", "init.strength=0.5")
        (image,) = sample(work, tmp_path / encode, *start, f"init.encode={encode}")
        assert image.shape == (32, 32, 3)


@pytest.mark.slow
def test_a_likelihood_is_measured(work: Path, tmp_path: Path) -> None:
    base = ("run", "likelihood", "--out", str(tmp_path / "out"), "--quiet", "--json", f"store={work / 'run/store'}")
    more = (f"checkpoint={work / 'base'}", "num_images=2")
    refused = call(*base, *more)
    assert refused.code == 2
    assert "num_steps: give it; the model's schedule (flow) is continuous" in refused.err
    result = call(*base, *more, "num_steps=5")
    assert result.code == 0, result.err
