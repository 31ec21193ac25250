"""The evidence of `benchmarks/slurm.py`, in a short form: a job on a real Slurm is put back into the queue."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import REPOSITORY
from tests.slurm_cluster import slurm_missing


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm_missing()), reason=slurm_missing())
def test_a_job_that_slurm_puts_back_goes_on_to_the_same_store(tmp_path: Path) -> None:
    out = tmp_path / "slurm.json"
    command = [sys.executable, "-m", "benchmarks.slurm", "--scene", "preempted", "--shards", "4", "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (story,) = json.loads(out.read_text())["results"]
    assert (story["starts"], story["requeued"], story["identical"]) == (2, 1, True)
