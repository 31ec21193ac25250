"""A small cascade trained for some steps through the command line."""

from pathlib import Path

import yaml

from tests.commands import Result, call, precompute
from tests.tiny_networks import EFFICIENT

UNET = EFFICIENT | {"text_dim": 64}
COMMON = {
    "text": "t5",
    "num_steps": 6,
    "batch_size": 4,
    "optimizer": {"lr": 0.001, "warmup_steps": 2},
    "checkpoints": {"every_steps": 3},
    "logging": {"every_steps": 2},
}
BASE = {"denoiser": {"size_px": 16, "unet": UNET}, **COMMON}
SUPER = {
    "denoiser": {
        "size_px": 32,
        "low_res_px": 16,
        "low_res_noise": {"kind": "lognormal"},
        "unet": UNET | {"image_size_px": 32, "low_res": True, "low_res_noise": True},
    },
    "views": {"crop_px": 16},
    **COMMON,
}


def write_cascade(folder: Path) -> Path:
    """The folder, with a store of 23 scenes `run`, a `base` (16 px) and an `sr` (16 -> 32 px) trained on it."""
    assert precompute(folder / "run", "source.num_samples=24", "images.sizes_px=[16,32]").code == 0
    for name, config in (("base", BASE), ("sr", SUPER)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"store": str(folder / "run/store"), **config}))
        result = train(folder, name, folder / name)
        assert result.code == 0, result.err
    return folder


def train(work: Path, name: str, out: Path, *more: str) -> Result:
    return call("run", "train", "-c", str(work / f"{name}.yaml"), "--out", str(out), "--quiet", *more)
