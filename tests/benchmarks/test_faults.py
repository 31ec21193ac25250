"""Commands survive a fault wherever they write: the benchmark `faults.py`, in short."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fault_points import EXIT_CODE, FaultPoints
from pipeline.storage.files import write_text
from tests.runs import REPOSITORY


@pytest.mark.slow
def test_some_faults_of_each_kind_end_as_an_uninterrupted_run(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    scenarios = ["run hdf5", "restart parquet", "remove parquet", "import"]
    arguments = ["--work", str(tmp_path / "work"), "--most", "10", "--seed", "3", "--out", str(out)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *arguments, "--scenarios", *scenarios],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=600,
    )
    rows = json.loads(out.read_text())["results"]
    assert sum(row["tries"] for row in rows) == 40
    assert {row["scenario"] for row in rows} == set(scenarios)


def faulty(tmp_path: Path, statements: Callable[[Path], None], kind: str, at: int) -> int:
    """Runs statements with a fault in a forked process; returns its exit code."""
    work, shadow = tmp_path / "work", tmp_path / "shadow"
    for folder in (work, shadow):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    child = os.fork()
    if child == 0:
        try:
            FaultPoints([work], shadow, kind, at, seed=at).install()
            statements(work)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write_safe_and_unsafe(work: Path) -> None:
    write_text(work / "a" / "f.txt", "safe")
    (work / "a" / "renamed").write_text("not synced")
    os.replace(work / "a" / "renamed", work / "a" / "f.txt")
    for number in range(8):
        (work / str(number)).touch()


@pytest.mark.slow
def test_a_loss_of_power_takes_what_was_not_synced_and_nothing_else(tmp_path: Path) -> None:
    found: list[str] = []
    while faulty(tmp_path, write_safe_and_unsafe, "power", at=len(found)) == EXIT_CODE:
        path = tmp_path / "work" / "a" / "f.txt"
        found.append(path.read_text() if path.exists() else "absent")
    synced = found.index("safe")
    assert set(found[:synced]) == {"absent"}
    assert len(found) > synced + 8
    assert {"safe"} < set(found[synced:]) <= {"safe", "", "not s"}, "absent never again; what replaced it may be empty"


def test_points_are_counted_below_the_given_folders_only(tmp_path: Path) -> None:
    points = FaultPoints([tmp_path / "run"], tmp_path / "shadow")
    for path in (tmp_path / "run" / "f", tmp_path / "elsewhere" / "f", tmp_path / "runs" / "f"):
        points._point("open", path)
    assert points.labels == [f"open {tmp_path}/run/f"]
