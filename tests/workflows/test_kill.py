"""SIGKILL at random moments, then the same command: the store's files are those of an uninterrupted run."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.workflows.conftest import REPOSITORY, command, pipeline, precompute, store_bytes

pytestmark = pytest.mark.slow

CONFIG = ["source.num_samples=240", "shard_size=24", "images.sizes_px=[32,64]"]


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


def descendants(pid: int) -> dict[int, str]:
    """Process id -> command line of all processes below `pid`."""
    table: dict[int, tuple[int, str]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError, IndexError):
                continue
            table[int(folder.name)] = (parent, line)
    found: dict[int, str] = {}
    frontier = [pid]
    while frontier:
        parents, frontier = frontier, []
        for child, (parent, line) in table.items():
            if parent in parents and child not in found:
                found[child] = line
                frontier.append(child)
    return found


def records(out: Path) -> int:
    return len(list((out / "state").glob("*/*.json")))


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 150  # Ray's agents wait a minute for a dead cluster before they go
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in pids if _is_alive(pid)], "processes were left behind"


def _is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_killed_driver_goes_on_with_the_same_command(
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
    wait_until_gone(children)


@pytest.mark.parametrize(
    ("executor", "victim"),
    [
        ("local", "spawn_main"),
        pytest.param("ray", "ray::fetch", marks=pytest.mark.ray),
        pytest.param("ray", "ray::_StageActor", marks=pytest.mark.ray),
    ],
)
def test_a_killed_worker_or_download_is_made_good_within_the_run(
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
