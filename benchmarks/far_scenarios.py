"""The commands that `far.py` disturbs, each with what was there before it. All are on one bucket."""

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from benchmarks.fault_scenarios import _TRAINING as TRAINING

_IMAGES, _PER_TAR = 8, 4
_UNREADABLE = 5


@dataclass(frozen=True)
class Scenario:
    """A command on an object store.

    Attributes:
        command: what is disturbed, and started again.
        base: commands whose results are there before it.
        folder: of the bucket, that its process holds while it works; "" for a command that only reads.
        takes_over: whether it has the option --take-over.
        workers: whether it starts processes of its own.
    """

    command: list[str]
    base: list[list[str]] = field(default_factory=list)
    folder: str = ""
    takes_over: bool = False
    workers: bool = False


def write_input(work: Path, put: Callable[[str, bytes], object], url: str) -> None:
    """Writes the local files that commands read, and the tars of the source.

    Args:
        put: writes an object of the bucket.
        url: of the bucket.
    """
    from PIL import Image

    from tests.stages.encoders import tiny_models

    for tar in range(0, _IMAGES, _PER_TAR):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as archive:
            for number in range(tar, tar + _PER_TAR):
                png = io.BytesIO()
                Image.new("RGB", (10 + number, 12), (number * 30, 90, 10)).save(png, "PNG")
                members = {
                    "png": b"no image" if number == _UNREADABLE else png.getvalue(),
                    "txt": b"image %d" % number,
                }
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        put(f"data/{tar // _PER_TAR:05d}.tar", data.getvalue())
    checkpoints = {"every_steps": 1, "keep": 1, "keep_best": 1}
    training = {**TRAINING, "store": f"{url}/run/store", "num_steps": 6, "checkpoints": checkpoints}
    (work / "train.yaml").write_text(yaml.safe_dump(training))
    tiny_models.write(tiny_models.clip, work / "tiny-clip")
    (work / "sample.yaml").write_text(yaml.safe_dump({**_sampled(url), "prompts": ["image 1", "image 2"]}))
    captions = {"kind": "store", "path": f"{url}/run", "num_captions": 3}
    evaluation = {
        "sample": {**_sampled(url), "captions": captions},
        "guidance": [1, 2],
        "reference": {"kind": "store", "path": f"{url}/run", "size_px": 8},
        "features": {"kind": "clip", "model": "tiny-clip"},
        "clip": {"model": "tiny-clip"},
        "kernel": {"num_subsets": 2},
    }
    (work / "evaluate.yaml").write_text(yaml.safe_dump(evaluation))


def _sampled(url: str) -> dict[str, object]:
    return {"stages": [{"checkpoint": f"{url}/trained", "sampling": {"num_steps": 2}}], "device": "cpu"}


def scenarios(url: str) -> dict[str, Scenario]:
    """By name."""

    def precompute(executor: str) -> list[str]:
        source = ["source.kind=webdataset", f"source.path={url}/data", "shard_size=4", "images.sizes_px=[8]"]
        execution = "execution={retry_delay_s: 0, num_cpus: 1}"
        return ["run", "precompute", "--out", f"{url}/run", "--executor", executor, "--quiet", *source, execution]

    def job(workflow: str, out: str) -> list[str]:
        return ["run", workflow, "-c", f"{workflow}.yaml", "--out", f"{url}/{out}", "--quiet"]

    run, train = precompute("inline"), job("train", "trained")
    remove = ["remove", f"{url}/run", "--key", "00000/0001"]
    return {
        "precompute": Scenario(run, folder="run", takes_over=True),
        "precompute with workers": Scenario(precompute("local"), folder="run", takes_over=True, workers=True),
        "train": Scenario(train, [run], folder="trained", takes_over=True),
        "sample": Scenario(job("sample", "images"), [run, train], folder="images", takes_over=True),
        "evaluate": Scenario(job("evaluate", "evaluated"), [run, train], folder="evaluated", takes_over=True),
        "remove": Scenario(remove, [run], folder="run"),
        "export": Scenario(["export", f"{url}/trained", "--out", "model.safetensors"], [run, train]),
        "export to S3": Scenario(["export", f"{url}/trained", "--out", f"{url}/model.safetensors"], [run, train]),
        "verify": Scenario(["verify", f"{url}/run"], [run]),
    }
