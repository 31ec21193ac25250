"""SIGKILL at random moments, then the same command: the store's files are those of an uninterrupted run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import descendants, wait_until_gone
from tests.runs import REPOSITORY, command, pipeline, precompute, store_bytes

pytestmark = pytest.mark.slow

CONFIG = ["source.num_samples=480", "shard_size=24", "images.sizes_px=[32,64]"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("reference") / "run"
    precompute(out, *CONFIG)
    return store_bytes(out)


def start(out: Path, executor: str) -> subprocess.Popen[bytes]:
    arguments = command("run", "precompute", "--out", str(out), "--executor", executor, "--quiet", *CONFIG)
    return subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True
    )


def records(out: Path) -> int:
    return len(list((out / "state").glob("*/*.json")))


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_killed_driver_resumes_with_the_same_command(
    executor: str, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    out, chance = tmp_path / "run", random.Random(executor)
    kills = 0
    children: list[int] = []
    for attempt in range(3):
        process = start(out, executor)
        before = records(out)
        while records(out) <= before + 2 and process.poll() is None:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1.0))
        if process.poll() is not None:
            break
        children += descendants(process.pid)
        process.kill()
        process.wait()
        kills += 1
        assert not (out / "store" / "manifest.json").exists() or attempt
    assert kills >= 2, "the run ended before it could be killed; make it longer"
    assert records(out) > 0
    pipeline("run", "precompute", "--out", str(out), "--executor", executor, "--quiet", *CONFIG)
    assert store_bytes(out) == uninterrupted
    left = wait_until_gone(children, timeout_s=150)  # Ray's agents wait a minute for a dead cluster before they go
    assert not left, "processes were left behind"


@pytest.mark.parametrize(
    ("executor", "victim"),
    [
        ("local", "multiprocessing.forkserver"),  # a worker, or what workers are forked from
        pytest.param("ray", "ray::StageActor", marks=pytest.mark.ray),  # any worker
    ],
)
def test_tasks_of_a_killed_worker_are_done_again_within_the_run(
    executor: str, victim: str, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    out = tmp_path / "run"
    process = start(out, executor)
    kills = 0
    while process.poll() is None and kills < 2:
        matching = [pid for pid, line in descendants(process.pid).items() if victim in line]
        if matching and records(out) > 2 * kills:
            os.kill(random.Random(kills).choice(matching), signal.SIGKILL)
            kills += 1
            time.sleep(1.0)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=240)
    assert kills >= 1
    assert process.returncode == 0, errors.decode()
    assert store_bytes(out) == uninterrupted


@pytest.mark.ray
def test_runs_killed_at_random_moments_end_with_every_byte_in_place(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    arguments = ["--runs", "1", "--seed", "7", "--work", str(tmp_path / "work"), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "benchmarks.chaos", *arguments], cwd=REPOSITORY, check=True, timeout=1100)
    rows = json.loads(out.read_text())["results"]
    assert [row["identical"] for row in rows] == [True]
    assert sum(len(row["kills"].split()) for row in rows) >= 1
