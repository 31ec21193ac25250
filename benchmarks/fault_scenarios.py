"""The commands that `faults.py` interrupts, each with the folder that it begins with."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

_RUN = [
    *("run", "precompute", "--out", "run", "--executor", "inline", "--quiet"),
    *("source.kind=folder", "source.path=input", "shard_size=4"),
    "execution={retry_delay_s: 0, max_attempts: 2}",
]
_VERIFY = ["verify", "run"]
_STATUS = ["status", "run"]
_UNET = {
    "family": "efficient",
    "image_size_px": 8,
    "embed_dim": 32,
    "channel_mult": [1],
    "num_res_blocks": [1],
    "attention_levels": [False],
    "head_dim": 16,
    "text_dim": 64,
    "low_res": False,
}
_TRAINING = {
    "store": "run/store",
    "denoiser": {"size_px": 8, "unet": _UNET},
    "text": "t5",
    "num_steps": 4,
    "batch_size": 2,
    "optimizer": {"lr": 0.001, "warmup_steps": 2},
    "validation": {"num_samples": 2, "every_steps": 1},
    "checkpoints": {"every_steps": 1, "keep": 1, "keep_best": 1},
    "logging": {"every_steps": 1},
}


def _nothing(work: Path) -> None:
    """Leaves the folder as it is."""


@dataclass(frozen=True)
class Scenario:
    """Commands, and what was there before them.

    Attributes:
        prepare: makes the input.
        base: commands whose results are there, without a fault.
        change: changes the input after them.
        commands: what is interrupted, and started again.
        status: a command that only reads, called before each further start.
    """

    prepare: Callable[[Path], None]
    commands: list[list[str]]
    base: list[list[str]] = field(default_factory=list)
    change: Callable[[Path], None] = _nothing
    status: list[str] = field(default_factory=lambda: list(_STATUS))


def _images(work: Path, first: int = 0, last: int = 6) -> None:
    from PIL import Image

    (work / "input").mkdir(exist_ok=True)
    for number in range(first, last):
        Image.new("RGB", (10 + number, 12), (number * 30, 90, 10)).save(work / f"input/{number}.png")
        (work / f"input/{number}.txt").write_text(f"image {number % 3}\n")
    (work / "input/2.png").write_bytes(bytes((work / "input/2.png").stat().st_size))


def _mend(work: Path) -> None:
    """Makes the unreadable image readable; it has as many bytes as before, so it is the same input."""
    from PIL import Image

    size = (work / "input/2.png").stat().st_size
    Image.new("RGB", (12, 12), (60, 90, 10)).save(work / "input/2.png")
    assert (work / "input/2.png").stat().st_size == size


def _more(work: Path) -> None:
    from PIL import Image

    for number in range(6, 9):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(work / f"input/{number}.png")
        (work / f"input/{number}.txt").write_text(f"later {number}\n")


def _training(work: Path) -> None:
    _images(work)
    (work / "train.yaml").write_text(yaml.safe_dump(_TRAINING))


def _minimagen(work: Path) -> None:
    """A training directory as MinImagen leaves it."""
    import torch

    from tests.stages.checkpoints.test_import_minimagen import EXPECTED, IMAGEN, STATES

    root = work / "minimagen"
    for name in ("parameters", "state_dicts", "tmp"):
        (root / name).mkdir(parents=True)
    for index, (case, state) in enumerate(STATES.items()):
        settings = EXPECTED[case]["settings"] | {"lowres_cond": False, "text_embed_dim": 512}
        (root / f"parameters/unet_{index}_params_20260101_120000.json").write_text(json.dumps(settings))
        torch.save(state, root / f"state_dicts/unet_{index}_state_20260101_120000.pth")
    (root / "parameters/imagen_params_20260101_120000.json").write_text(json.dumps(IMAGEN))
    (root / "parameters/training_parameters_20260101_120000.txt").write_text("--TIMESTEPS=25\n")


def _run(size: str, store_format: str) -> list[str]:
    return [*_RUN, f"images.sizes_px=[{size}]", f"store.format={store_format}"]


def _of_format(store_format: str) -> dict[str, Scenario]:
    run = _run("8", store_format)
    remove = ["remove", "run", "--key", "1.png"]
    return {
        "run": Scenario(_images, [run, _VERIFY]),
        "restart": Scenario(
            _images,
            [[*_run("8", store_format), "images.filter=lanczos", "--restart"], _VERIFY],
            base=[run],
        ),
        "retry-dropped": Scenario(_images, [[*run, "--retry-dropped", "all"], _VERIFY], base=[run], change=_mend),
        "growth": Scenario(_images, [run, _VERIFY], base=[run], change=_more),
        "add-a-size": Scenario(_images, [_run("8,12", store_format), _VERIFY], base=[run]),
        "remove": Scenario(_images, [remove, _VERIFY], base=[run]),
        "compact": Scenario(_images, [["remove", "run", "--compact"], _VERIFY], base=[run, remove]),
    }


SCENARIOS: dict[str, Scenario] = {
    **{f"{name} {form}": one for form in ("parquet", "hdf5") for name, one in _of_format(form).items()},
    "report": Scenario(_images, [["report", "run"]], base=[_run("8", "parquet")]),
    "import": Scenario(
        _minimagen,
        [["import", "minimagen", "minimagen", "--out", "imported", "--encoder-model", "tiny-random-t5"]],
        status=[],
    ),
    "train": Scenario(
        _training,
        [["run", "train", "-c", "train.yaml", "--out", "trained", "--quiet"]],
        base=[_run("8", "parquet")],
        status=["status", "trained"],
    ),
    "export": Scenario(
        _training,
        [["export", "trained", "--out", "model.safetensors"]],
        base=[_run("8", "parquet"), ["run", "train", "-c", "train.yaml", "--out", "trained", "--quiet"]],
        status=[],
    ),
}
"""By name; those that write a store in each of its formats."""
