"""A few of the kills of `benchmarks.preemption`, and how it counts what was done again."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.preemption_run import lost_work
from tests.runs import REPOSITORY


def run_of(folder: Path, events: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("shard_size: 2\n")
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def task(stage: str, shard: int, time: float) -> dict[str, Any]:
    return {"event": "task", "stage": stage, "shard": shard, "time": time}


def lost(stage: str, shard: int, time: float, kind: str = "node") -> dict[str, Any]:
    return {"event": "task_failed", "stage": stage, "shard": shard, "time": time, "lost": kind}


def test_images_that_are_fetched_again_without_a_cause_are_unexplained(tmp_path: Path) -> None:
    events = [task("fetch", 0, 3.0), lost("fetch", 1, 4.0), task("fetch", 1, 6.0), task("resize", 0, 4.0)]
    run = run_of(tmp_path / "run", events)
    requests = [(1.0, 0), (2.0, 1), (1.0, 2), (5.0, 2), (5.5, 3)]
    images: Any = SimpleNamespace(requests=requests)
    found = lost_work(run, images, ends=[])
    assert (found["requests_again"], found["allowed_again"], found["unexplained_again"]) == (1, 2, 0)
    assert (found["tasks"], found["tasks_lost_with_nodes"], found["finished_again"]) == (3, 1, 0)
    images.requests = [*requests, (7.0, 0), (7.0, 3)]
    assert lost_work(run, images, ends=[])["unexplained_again"] == 1, "shard 1 was lost once, shard 0 never"


@pytest.mark.parametrize(("end", "unexplained"), [(0.2, 1), (0.8, 0), (2.5, 0), (3.5, 1)])
def test_a_driver_that_ends_explains_what_was_under_way_then(tmp_path: Path, end: float, unexplained: int) -> None:
    started = [{"event": "run_started", "time": time} for time in (0.0, 0.5, 1.5, 2.6)]
    run = run_of(tmp_path / "run", [*started, task("fetch", 0, 3.0)])
    images: Any = SimpleNamespace(requests=[(1.0, 0), (2.0, 1), (2.8, 0)])
    assert lost_work(run, images, [end])["unexplained_again"] == unexplained


def test_work_that_was_finished_twice_is_counted(tmp_path: Path) -> None:
    events = [task("fetch", 0, 1.0), task("fetch", 0, 2.0), lost("fetch", 0, 1.5, "worker")]
    images: Any = SimpleNamespace(requests=[])
    found = lost_work(run_of(tmp_path / "run", events), images, [])
    assert (found["finished_again"], found["tasks_failed_otherwise"]) == (1, 1)


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_whose_nodes_and_driver_are_killed_leaves_the_store_of_an_undisturbed_one(tmp_path: Path) -> None:
    arguments = [
        "--nodes=2",
        "--kills=2",
        "--drivers=1",
        "--heads=0",
        "--images=48",
        "--every-s=4",
        "--speedup-images=0",
    ]
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.preemption",
        *arguments,
        f"--work={tmp_path / 'work'}",
        f"--out={out}",
    ]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = json.loads(out.read_text())["results"]
    assert found["compared_files"] > 3 * 12
    assert (found["different_files"], found["set_aside"], found["half_written"]) == (0, 0, 0)
    assert (found["finished_again"], found["unexplained_again"], found["tasks_failed_otherwise"]) == (0, 0, 0)
    assert (found["nodes_added"], found["starts"] - found["runs"]) == (2, 1)
