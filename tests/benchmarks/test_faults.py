"""Commands survive a fault wherever they write: the benchmark `faults.py`, in short."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fault_points import EXIT_CODE, FaultPoints
from tests.runs import REPOSITORY


@pytest.mark.slow
def test_some_faults_of_each_kind_end_as_an_uninterrupted_run(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    scenarios = ["run parquet", "restart hdf5", "remove parquet", "import"]
    arguments = ["--work", str(tmp_path / "work"), "--most", "16", "--seed", "3", "--out", str(out)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *arguments, "--scenarios", *scenarios],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=600,
    )
    rows = json.loads(out.read_text())["results"]
    assert sum(row["tries"] for row in rows) == 64
    assert {row["scenario"] for row in rows} == set(scenarios)


def faulty(tmp_path: Path, script: str, kind: str, at: int) -> int:
    """Runs statements with a fault in a process of its own; returns its exit code."""
    work, shadow = tmp_path / "work", tmp_path / "shadow"
    for folder in (work, shadow):
        folder.mkdir(exist_ok=True)
    code = (
        "import os, pathlib\nfrom benchmarks.fault_points import FaultPoints\n"
        f"work = pathlib.Path({str(work)!r})\n"
        f"points = FaultPoints([work], pathlib.Path({str(shadow)!r}), {kind!r}, {at}, seed=1)\npoints.install()\n{script}"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False, capture_output=True).returncode


@pytest.mark.slow
def test_a_loss_of_power_takes_what_was_not_synced_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "from pipeline.storage.files import write_text\n"
        "write_text(work / 'a' / 'safe.txt', 'safe')\n"
        "(work / 'lost.txt').write_text('lost')\n"
        "(work / 'a' / 'renamed').write_text('lost too')\n"
        "os.replace(work / 'a' / 'renamed', work / 'a' / 'safe.txt')\n"
        "(work / 'end').write_text('')\n"
    )
    lost: set[str] = set()
    for at in range(40):
        for path in sorted((tmp_path / "work").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        code = faulty(tmp_path, script, "power", at)
        if code == 0:
            break
        assert code == EXIT_CODE
        found = tmp_path / "work" / "a" / "safe.txt"
        lost.add(found.read_text() if found.exists() else "absent")
    assert {"absent", "safe"} <= lost, "a synced file stays, and one that was not synced may be gone"
    assert lost <= {"absent", "safe", "", "lost"}


def test_points_are_counted_below_the_given_folders_only(tmp_path: Path) -> None:
    points = FaultPoints([tmp_path / "work"], tmp_path / "shadow")
    for path in (tmp_path / "work" / "f", tmp_path / "elsewhere" / "f", tmp_path / "workshop" / "f"):
        points._point("open", path)
    assert points.labels == [f"open {tmp_path}/work/f"]
