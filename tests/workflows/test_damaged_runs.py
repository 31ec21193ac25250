"""Every file of a training's run folder, damaged in every way, followed by every command that reads it.

Each damage is named with its file, or changes nothing of what the command makes; and nothing ends in a traceback.
"""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.commands import Result, call, precompute
from tests.imagen_core.train.small import files
from tests.trained import BASE, UNET

SETTINGS = {
    **BASE,
    "denoiser": {"size_px": 16, "unet": UNET},
    "num_steps": 4,
    "checkpoints": {"every_steps": 2, "keep_best": 1},
    "validation": {"num_samples": 2, "every_steps": 2},
    "grid": {"every_steps": 2, "num_images": 1, "num_steps": 1},
    "logging": {"every_steps": 1},
}
OF_ANY_RUN = {".lock", "config.yaml", "events.jsonl", "plan.json", "summary.json"}
"""Files of the engine, which are not a training's alone."""


def flip(file: Path, other: Path) -> None:
    """One bit in the middle of the file."""
    data = bytearray(file.read_bytes())
    data[random.Random(file.name).randrange(len(data))] ^= 1
    file.write_bytes(data)


def cut(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path, other: Path) -> None:
    os.truncate(file, 0)


def delete(file: Path, other: Path) -> None:
    file.unlink()


def swap(file: Path, other: Path) -> None:
    data = file.read_bytes()
    shutil.copyfile(other, file)
    other.write_bytes(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store in `run`, a training of 4 steps in `base`, and what its commands make in `expected`."""
    folder = tmp_path_factory.mktemp("damaged")
    assert precompute(folder / "run", "source.num_samples=12", "images.sizes_px=[16]").code == 0
    (folder / "base.yaml").write_text(yaml.safe_dump({"store": str(folder / "run/store"), **SETTINGS}))
    result = call("run", "train", "-c", str(folder / "base.yaml"), "--out", str(folder / "base"), "--quiet")
    assert result.code == 0, result.err
    shutil.copytree(folder / "base", folder / "expected")
    for made in (resume(folder, folder / "expected"), export(folder / "base", folder / "expected.safetensors")):
        assert made.code == 0, made.err
    return folder


def resume(folder: Path, run: Path) -> Result:
    return call("run", "train", "-c", str(folder / "base.yaml"), "--out", str(run), "--quiet", "num_steps=5")


def export(run: Path, to: Path) -> Result:
    return call("export", str(run), "--out", str(to))


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def is_named(result: Result, *damaged: Path) -> bool:
    """Whether a command refused, and named one of the files."""
    return result.code in (1, 2, 4) and any(str(file) in result.err for file in damaged)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("damage", [flip, cut, empty, delete, swap])
def test_no_damage_of_a_training_goes_unseen(
    trained: Path, tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    paths = (path.relative_to(trained / "base") for path in (trained / "base").rglob("*") if path.is_file())
    names = sorted(name for name in paths if name.name not in OF_ANY_RUN)
    if damage in (cut, empty):  # of the checkpoint before the newest, these are found as a flip is
        names = [name for name in names if name.parent.name != "step-00000002"]
    wrong: list[object] = []
    named = 0
    for number, name in enumerate(names):
        run = tmp_path / str(number) / "base"
        shutil.copytree(trained / "base", run)
        last, rest = newest(run), (*names[number + 1 :], *names)
        damaged = [run / name, run / next(other for other in rest if other.suffix == name.suffix)]
        damage(*damaged)
        for command in ("status", "inspect", "report"):
            result = call(command, str(run))
            if result.code and not result.err.startswith("error: "):
                wrong.append((command, name, result))
        exported, model = export(run, run.parent / "m.safetensors"), run.parent / "m.safetensors"
        if exported.code:
            if not is_named(exported, *damaged):
                wrong.append((name, exported.err))
        elif model.read_bytes() != (trained / "expected.safetensors").read_bytes() and (last / "state.json").exists():
            wrong.append((name, "another model is exported"))
        resumed = resume(trained, run)
        named += bool(resumed.code)
        if resumed.code and not is_named(resumed, *damaged):
            wrong.append((name, resumed.err))
        elif (
            resumed.code
            and last == (run / name).parent
            and damage is not swap
            and f"{min(last.parent.iterdir())} is intact" not in resumed.err
        ):
            wrong.append((name, "no intact checkpoint is named", resumed.err))
        elif not resumed.code and files(newest(run)) != files(newest(trained / "expected")):
            wrong.append((name, "resumed to other weights"))
        shutil.rmtree(run.parent)
    assert not wrong
    assert named >= 2
