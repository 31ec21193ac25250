"""The Slurm script, run by bash with stubs in place of Slurm, Ray and `pipeline`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.deploy.schedule import Schedule, render

STUBS = {
    "pipeline": """
echo "pipeline $*" >>"$CALLS"
pwd >"$CALLS.folder"
if [ "$CODE" = wait ]; then
  trap 'touch "$CALLS.stopping"; until [ -e "$CALLS.go" ]; do sleep 0.02; done; exit 75' TERM
  touch "$CALLS.started"
  while :; do sleep 0.02; done
fi
exit "$CODE"
""",
    "srun": """
echo "srun $*" >>"$CALLS"
echo "token $RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(wc -c <"$RAY_AUTH_TOKEN_PATH")" >>"$CALLS"
case "$*" in *--head*) [ -z "${RAY_CODE:-}" ] || exit "$RAY_CODE" ;; esac
while kill -0 "$PPID" 2>/dev/null; do sleep 0.02; done
""",
    "python": """
cat >"$CALLS.python"
until [ "$(grep -c ^token "$CALLS")" = 2 ]; do kill -0 "$PPID" 2>/dev/null || exit 1; sleep 0.02; done
for _ in $(seq "${PYTHON_S:-0}"); do kill -0 "$PPID" 2>/dev/null && sleep 1; done
exit "${PYTHON_CODE:-0}"
""",
    "scontrol": 'echo "scontrol $*" >>"$CALLS"\n',
    "squeue": '[ "$*" = "--noheader --jobs=${JOB:-42} --format=%T" ] && echo "${STATE:-RUNNING}"\n',
    "hostname": '[ "$1" = -I ] && echo "10.0.0.1 172.17.0.1" || echo node1\n',
}


class Cluster:
    """A stub for each command on PATH; each call is noted."""

    def __init__(self, root: Path):
        self.calls_file = root / "calls"
        bin_folder = root / "bin dir"
        bin_folder.mkdir()
        for name, text in STUBS.items():
            (bin_folder / name).write_text(f"#!/bin/bash\n{text}")
            (bin_folder / name).chmod(0o755)
        self.home, self.folder = root / "home", root / "it's mine"
        self.home.mkdir()
        self.folder.mkdir()
        self.script = root / "job.sh"
        self.environment = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "CALLS": str(self.calls_file),
            "SLURM_JOB_ID": "42",
            "SLURM_CPUS_PER_TASK": "16",
        }

    def start(self, code: str, **environment: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", str(self.script)], env={**self.environment, "CODE": code, **environment}, cwd=self.home
        )

    def wait_for(self, name: str) -> None:
        give_up = time.monotonic() + 30
        while not self.calls_file.with_name(name).exists():
            assert time.monotonic() < give_up, f"no {name}"
            time.sleep(0.02)

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin dir" / "python"))
    schedule = Schedule("slurm", "precompute", None, "/data/run1", ("a=$(id) 'b'",), folder=found.folder)
    (text,) = render(schedule).values()
    found.script.write_text(text)
    return found


COMMAND = "pipeline run precompute --out /data/run1 a=$(id) 'b'"


def test_the_directives_ask_for_a_signal_and_a_requeue(cluster: Cluster) -> None:
    subprocess.run(["bash", "-n", str(cluster.script)], check=True)
    lines = cluster.script.read_text().splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--signal=B:USR1@300", "--requeue", "--job-name=precompute-run1"} <= set(directives)
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(i < first_command for i, line in enumerate(lines) if line.startswith("#SBATCH"))


@pytest.mark.parametrize("code", [0, 1, 2, 3, 137])
def test_the_exit_code_is_that_of_the_run(cluster: Cluster, code: int) -> None:
    assert cluster.start(str(code)).wait(30) == code
    assert cluster.calls() == [COMMAND]
    assert (cluster.calls_file.with_name("calls.folder")).read_text().strip() == str(cluster.folder)


def test_a_preempted_run_is_put_back_into_the_queue(cluster: Cluster) -> None:
    assert cluster.start("75").wait(30) == 75
    assert cluster.calls() == [COMMAND, "scontrol requeue 42"]


def test_the_signal_before_the_time_is_up_becomes_one_to_stop_and_the_run_ends_in_its_own_time(
    cluster: Cluster,
) -> None:
    job = cluster.start("wait")
    cluster.wait_for("calls.started")
    job.send_signal(signal.SIGUSR1)
    cluster.wait_for("calls.stopping")
    job.send_signal(signal.SIGUSR1)  # a second one does not end the wait
    cluster.calls_file.with_name("calls.go").touch()
    assert job.wait(30) == 75
    assert cluster.calls() == [COMMAND, "scontrol requeue 42"]


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "CANCELLED"])
def test_a_job_that_slurm_ends_is_told_once_and_put_back_only_if_it_still_runs(cluster: Cluster, state: str) -> None:
    job = cluster.start("wait", STATE=state)
    cluster.wait_for("calls.started")
    job.send_signal(signal.SIGTERM)  # Slurm sends it to all processes of a job, here to the script alone
    time.sleep(0.3)
    assert not cluster.calls_file.with_name("calls.stopping").exists(), "it reaches the run a second time"
    cluster.calls_file.with_name("calls.go").touch()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 75
    assert cluster.calls() == [COMMAND, *(["scontrol requeue 42"] if state == "RUNNING" else [])]


def test_several_nodes_become_a_ray_cluster_with_a_token(cluster: Cluster) -> None:
    assert cluster.start("0", SLURM_JOB_NUM_NODES="3").wait(30) == 0
    calls = cluster.calls()
    ray = f"{cluster.script.parent}/bin dir/ray start"
    sruns = sorted(call for call in calls if call.startswith("srun"))
    assert sruns == [
        f"srun --nodes=1 --ntasks=1 --nodelist=node1 {ray} --head --block --node-ip-address=10.0.0.1 "
        "--port=20042 --dashboard-host=127.0.0.1 --num-cpus=16",
        f"srun --nodes=2 --ntasks=2 --exclude=node1 {ray} --block --address=10.0.0.1:20042 --num-cpus=16",
    ]
    assert [call for call in calls if call.startswith("token")] == ["token token 600 64"] * 2
    assert calls[-1] == f"{COMMAND} --executor ray --address 10.0.0.1:20042"
    compile(cluster.calls_file.with_name("calls.python").read_text(), "wait.py", "exec")
    assert not list(cluster.home.iterdir())  # the token is gone


@pytest.mark.parametrize("ends", [{"PYTHON_CODE": "1"}, {"RAY_CODE": "2", "PYTHON_S": "20"}], ids=["late", "at once"])
def test_a_ray_cluster_that_does_not_come_up_is_an_error_of_the_environment(
    cluster: Cluster, ends: dict[str, str]
) -> None:
    assert cluster.start("0", SLURM_JOB_NUM_NODES="2", **ends).wait(15) == 4
    assert not any(call.startswith(("pipeline", "scontrol")) for call in cluster.calls())
