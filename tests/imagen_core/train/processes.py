"""Trainings of several processes (gloo, on this machine)."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imagen_core.train.checkpoints.checkpoint import checkpoints
from tests.imagen_core.train.small import make_config
from tests.imagen_core.train.worker import run

ROOT = Path(__file__).parents[3]


@contextmanager
def launched(folder: Path, jobs: list[dict[str, Any]], size: int = 2) -> Iterator[None]:
    """Runs jobs in `size` processes while the block runs; at its end waits for them.

    Fails if one of them fails, with its output.
    """
    file, output = folder / "jobs.json", folder / "output.txt"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.imagen_core.train.worker", str(file), str(size), f"{file}.group"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=output.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        yield
        process.wait(timeout=250)
    finally:
        process.kill()
    assert process.returncode == 0, output.read_text(encoding="utf-8")


def job(store: Path, out: Path, **changes: Any) -> dict[str, Any]:
    extra = {name: changes.pop(name) for name in ("stop_at", "poison", "unreadable") if name in changes}
    return {"config": make_config(store, **changes).model_dump(mode="json"), "out": str(out)} | extra


def report(folder: Path, name: str, part: str = "rank-0") -> dict[str, Any]:
    """What a process wrote about a run."""
    return json.loads((folder / name / f"{part}.json").read_text(encoding="utf-8"))


def newest(out: Path) -> Path:
    """The newest checkpoint of a run."""
    return checkpoints(out / "checkpoints")[-1]


def train_split(store: Path, folder: Path, runs: dict[str, dict[str, Any]], **changes: Any) -> None:
    """Does `runs` in two processes, then `folder/split`: two processes to step 4, one to 8, two to 13.

    Reports of its parts are first-RANK.json, second-0.json and rank-RANK.json.
    """
    split, go = folder / "split", folder / "go"
    jobs = [job(store, split, **changes, num_steps=4), {"wait_for": str(go)}]
    jobs += [job(store, split, **changes, num_steps=13)]
    jobs += [job(store, folder / name, **settings) for name, settings in runs.items()]
    with launched(folder, jobs):
        deadline = time.monotonic() + 200
        while not all((split / f"rank-{rank}.json").exists() for rank in range(2)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for rank in range(2):
            (split / f"rank-{rank}.json").rename(split / f"first-{rank}.json")
        run(job(store, split, **changes | {"num_steps": 8, "parallel": {"kind": "ddp"}}), 0)
        (split / "rank-0.json").rename(split / "second-0.json")
        go.touch()


def keys_in_order(folder: Path, name: str) -> list[str]:
    """Keys a split run was trained on, in the order of the samples."""
    keys: list[str] = []
    for parts in (("first-0", "first-1"), ("second-0",), ("rank-0", "rank-1")):
        batches = [report(folder, name, part)["keys"] for part in parts]
        keys += [key for step in zip(*batches, strict=True) for part in step for key in part]
    return keys
