"""`pipeline schedule --kind slurm`: what a job asks for, arrays, and containers."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.deploy.schedule import Schedule, install_command, render
from pipeline.deploy.slurm import SlurmOptions, container_mounts, local_paths, seconds_of
from pipeline.errors import ConfigError
from tests.commands import Result, call
from tests.pipeline.deploy.test_schedule import HOSTILE


def slurm(workflow: str, *arguments: str) -> Result:
    return call("schedule", workflow, "--kind", "slurm", "--out", "/scratch/run1", *arguments)


def asks_for(workflow: str, *arguments: str) -> dict[str, str]:
    """The options of sbatch in the first script."""
    found = slurm(workflow, *arguments)
    assert found.code == 0, found.err
    text = found.out.partition("-finish.sh\n#!")[0]
    lines = re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE)
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize(
    ("workflow", "arguments", "gpus", "nodes"),
    [
        ("precompute", ["-c", "demo"], None, "1"),
        ("precompute", ["-c", "urls-t5-xxl"], "1", "1"),
        ("precompute", ["-c", "urls-t5-xxl", "encoders.0.num_gpus=0"], None, "1"),
        ("precompute", ["-c", "demo", "encoders.0.num_gpus=0.5"], "1", "1"),
        ("precompute", ["-c", "urls-t5-xxl", "encoders.0.workers=4"], "4", "1"),
        ("precompute", ["-c", "urls-t5-xxl", "encoders.0.workers=24"], "8", "3"),
        ("precompute", ["-c", "urls-t5-xxl", "encoders.0.workers=24", "--gpus", "a100:4"], "a100:4", "6"),
        ("precompute", ["-c", "urls-t5-xxl", "encoders.0.workers=24", "--array", "9"], "1", "1"),
        ("precompute", ["-c", "urls-t5-xxl", "--gpus", "0"], None, "1"),
        ("train", ["-c", "nemo-base64-500m"], "1", "1"),
        ("train", ["-c", "nemo-base64-500m", "workers.num_workers=16"], "8", "2"),
        ("train", ["-c", "nemo-base64-500m", "workers.use_gpu=false"], None, "1"),
        ("sample", ["-c", "demo"], "1", "1"),
        ("sample", ["-c", "demo", "device=cpu"], None, "1"),
        ("export", ["store=/data/store", "to=mds"], None, "1"),
    ],
)
def test_a_job_asks_for_the_gpus_that_the_run_can_use(
    workflow: str, arguments: Sequence[str], gpus: str | None, nodes: str
) -> None:
    asked = asks_for(workflow, *arguments)
    assert (asked.get("gpus-per-node"), asked["nodes"]) == (gpus, nodes)


@pytest.mark.parametrize(
    ("arguments", "cpus"),
    [
        (["-c", "demo"], "16"),
        (["-c", "demo", "execution.num_cpus=6"], "6"),
        (["-c", "demo", "images.sizes_px=[]"], "4"),
        (["-c", "demo", "--cpus", "2"], "2"),
    ],
)
def test_a_job_asks_for_the_cpus_that_the_run_can_use(arguments: Sequence[str], cpus: str) -> None:
    assert asks_for("precompute", *arguments)["cpus-per-task"] == cpus


def test_all_options_become_directives() -> None:
    sizes = "--nodes 2 --cpus 8 --gpus h100:4 --memory 100G --time 1-12 --partition gpu,spare --account lab --qos high"
    assert asks_for("precompute", "-c", "demo", *sizes.split()) == {
        "job-name": "precompute-run1",
        "output": "%x-%j.log",
        "open-mode": "append",
        "nodes": "2",
        "ntasks-per-node": "1",
        "cpus-per-task": "8",
        "gpus-per-node": "h100:4",
        "mem": "100G",
        "time": "1-12",
        "partition": "gpu,spare",
        "account": "lab",
        "qos": "high",
        "requeue": "",
        "signal": "B:USR1@300",
    }


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("2:30", 150),
        ("1:00:05", 3605),
        ("2-0", 172800),
        ("1-12:30", 131400),
        ("1-12:30:07", 131407),
    ],
)
def test_a_time_limit_is_what_sbatch_takes(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def test_of_a_short_time_half_is_left_to_stop() -> None:
    assert asks_for("precompute", "-c", "demo", "--time", "4")["signal"] == "B:USR1@120"
    assert asks_for("precompute", "-c", "demo", "--time", "10")["signal"] == "B:USR1@300"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--time", "12h"], "--time 12h: is no time limit of Slurm; for example 90 (minutes), 12:00:00 or 2-00:00:00"),
        (["--time", "0"], "--time 0: is no time limit of Slurm"),
        (["--time", "1\n#SBATCH --wrap=x"], "--time '1\\n#SBATCH --wrap=x': has a line break"),
        (["--memory", "64 GB"], "--memory 64 GB: is no amount of memory; for example 64G"),
        (["--gpus", "a100"], "--gpus a100: is no number of GPUs; for example 4, or a100:4"),
        (["--gpus", "-1"], "--gpus -1: is no number of GPUs"),
        (["--cpus", "0"], "--cpus 0: must be at least 1"),
        (["--array", "0"], "--array 0: must be at least 1"),
        (["--array", "3", "--nodes", "2"], "--nodes 2: a task of an array runs on one node; leave it or --array out"),
        (["--partition", "gpu --wrap=x"], "--partition 'gpu --wrap=x': is no name of Slurm"),
        (["--account", "$(id)"], "--account '$(id)': is no name of Slurm"),
        (["--qos", ""], "--qos '': is no name of Slurm"),
        (["--executor", "slurm"], "--executor: must be one of ray, local, inline (got 'slurm')"),
        (["--kind", "cron", "--partition", "gpu"], "--partition gpu: --kind cron cannot use it; leave it out"),
    ],
)
def test_what_slurm_would_not_take_is_refused(tmp_path: Path, arguments: Sequence[str], says: str) -> None:
    found = slurm("precompute", "-c", "demo", *arguments, "--write-to", str(tmp_path / "new"))
    assert (found.code, list(tmp_path.iterdir())) == (2, [])
    assert says in found.err


def test_a_workflow_without_parts_is_no_array() -> None:
    found = slurm("train", "-c", "demo-base", "--array", "3")
    assert (found.code, found.err) == (2, "error: --array 3: train has no parts; leave it out\n")


def test_several_gpus_of_one_node_are_used_by_ray() -> None:
    def executor(*arguments: str) -> list[str]:
        return re.findall(r"--executor (\w+)\)", slurm("train", "-c", "nemo-base64-500m", *arguments).out)

    assert executor() == []
    assert executor("--gpus", "2") == ["ray"]
    assert executor("--gpus", "2", "--executor", "local") == ["local"]


STUBS = {
    "pipeline": """printf '%s\\0' "$@" >"$CALLS.arguments"
if [ "$CODE" = wait ]; then
  trap 'echo TERM >>"$CALLS"; until [ -e "$CALLS.go" ]; do sleep 0.02; done; exit 75' TERM
  touch "$CALLS.started"
  while :; do sleep 0.02; done
fi
exit "${CODE:-0}"
""",
    "srun": """while [[ $1 == --* ]]; do
  case $1 in --container-*) printf '%s\\n' "$1" >>"$CALLS.containers" ;; esac
  shift
done
exec "$@"
""",
    "squeue": "echo RUNNING\n",
    "scontrol": 'echo "scontrol $*" >>"$CALLS"\n',
}


class Scripts:
    """The scripts of a schedule, run by bash with stubs for Slurm; a stub `pipeline` notes how it was called."""

    def __init__(self, root: Path, schedule: Schedule):
        self.root, self.calls, self.schedule = root, root / "calls", schedule
        self.bin = root / "bin"
        self.bin.mkdir()
        schedule.folder.mkdir()
        for name, text in STUBS.items():
            (self.bin / name).write_text(f"#!/bin/bash\n{text}")
            (self.bin / name).chmod(0o755)

    def start(self, number: int, **environment: str) -> subprocess.Popen[bytes]:
        texts = list(render(self.schedule).values())
        (self.root / "job.sh").write_text(texts[number], encoding="utf-8")
        known = {"PATH": f"{self.bin}:{os.environ['PATH']}", "CALLS": str(self.calls), "HOME": str(self.root)}
        known |= {"SLURM_JOB_ID": "42", "SLURMD_NODENAME": "n1"}
        return subprocess.Popen(["bash", str(self.root / "job.sh")], env={**known, **environment})

    def arguments(self) -> list[str]:
        return self.calls.with_name("calls.arguments").read_text(encoding="utf-8").split("\0")[:-1]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder whose `bin` has the `pipeline` of the scripts."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    return tmp_path


def in_parts(here: Path, overrides: tuple[str, ...] = ()) -> Schedule:
    options = SlurmOptions(array=3, partition="p", gpus="1")
    return Schedule("slurm", "precompute", None, "/scratch/run 1", overrides, folder=here / "it's mine", slurm=options)


TASK = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"}


def test_a_task_of_an_array_makes_its_part_and_puts_only_itself_back(here: Path) -> None:
    scripts = Scripts(here, in_parts(here, HOSTILE))
    assert scripts.start(0, CODE="75", **TASK).wait(30) == 75
    assert scripts.arguments() == ["run", "precompute", "--out", "/scratch/run 1", *HOSTILE, "--part", "2/3"]
    assert scripts.calls.read_text() == "scontrol requeue 40_2\n", "the job's own id may be that of the whole array"


def test_the_last_job_of_an_array_finishes_the_run(here: Path) -> None:
    scripts = Scripts(here, in_parts(here))
    assert scripts.start(1, CODE="3").wait(30) == 3
    assert scripts.arguments() == ["finish", "/scratch/run 1"]
    finish = (here / "job.sh").read_text()
    assert "#SBATCH --partition=p\n" in finish
    assert "gpu" not in finish


def test_an_array_is_installed_before_the_job_that_waits_for_it() -> None:
    schedule = Schedule("slurm", "precompute", None, "/scratch/run1", slurm=SlurmOptions(array=3))
    command = install_command(schedule, ["my jobs/a.sh", "my jobs/b.sh"])
    sbatch = 'sbatch() { echo "sbatch $*" >&2; echo "17;cluster"; }; '
    done = subprocess.run(["bash", "-c", sbatch + command], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        "sbatch --parsable my jobs/a.sh",
        "sbatch --dependency=afterany:17 my jobs/b.sh",
    ]


def test_a_container_runs_the_command_and_sees_what_the_run_needs(here: Path) -> None:
    config, data = here / "my.yaml", here / "data"
    config.write_text("shard_size: 9\n")
    data.mkdir()
    schedule = Schedule("slurm", "precompute", str(config), f"{here}/new/run1", HOSTILE, image="registry#image:1")
    scripts = Scripts(here, replace(schedule, folder=here / "w", paths=(str(data), "/etc/hosts")))
    assert scripts.start(0).wait(30) == 0
    assert scripts.arguments() == ["run", "precompute", "--config", str(config), "--out", f"{here}/new/run1", *HOSTILE]
    image, mounts, folder = scripts.calls.with_name("calls.containers").read_text().splitlines()
    assert image == "--container-image=registry#image:1"
    assert folder == f"--container-workdir={here}/w"
    assert mounts.removeprefix("--container-mounts=").split(",") == [
        f"{here}/w:{here}/w",
        f"{here}/new/run1:{here}/new/run1",
        "/etc/hosts:/etc/hosts:ro",
        f"{data}:{data}:ro",
        f"{config}:{config}:ro",
    ]
    assert (here / "new" / "run1").is_dir(), "Pyxis mounts only what exists"
    assert not list((here / "w").iterdir()), "the file with the process id is gone"


def test_the_signal_reaches_the_run_in_the_container_once(here: Path) -> None:
    options = SlurmOptions(array=3)
    scripts = Scripts(here, Schedule("slurm", "precompute", image="i", folder=here / "w", slurm=options))
    job = scripts.start(0, CODE="wait", **TASK)
    give_up = time.monotonic() + 30
    while not scripts.calls.with_name("calls.started").exists():
        assert time.monotonic() < give_up
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    while not scripts.calls.exists():
        assert time.monotonic() < give_up
        time.sleep(0.02)
    scripts.calls.with_name("calls.go").touch()
    assert job.wait(30) == 75
    assert scripts.calls.read_text().splitlines() == ["TERM", "scontrol requeue 40_2"]


@pytest.mark.parametrize("path", ["/my data/x", "/a,b", "/a:b"])
def test_a_path_that_pyxis_cannot_mount_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--container-image: {path} cannot be mounted")):
        container_mounts([path], ["/scratch/run1"])


def test_what_lies_in_a_mounted_folder_is_not_mounted_again() -> None:
    assert container_mounts(["/w/my.yaml", "/data", "/data/a.csv"], ["/w/run1", "/w"]) == "/w:/w,/data:/data:ro"


def test_local_paths_are_those_that_exist_and_the_folders_of_patterns(tmp_path: Path) -> None:
    (tmp_path / "urls.parquet").touch()
    (tmp_path / "tars").mkdir()
    settings = {
        "source": {"path": [f"{tmp_path}/urls.parquet", f"{tmp_path}/tars/{{00..99}}.tar", "relative.csv"]},
        "encoders": [{"model": f"{tmp_path}/not-there"}, {"model": "google/t5"}, {"batch": 3}],
        "prompt": "/ of an image",
    }
    assert local_paths(settings) == [f"{tmp_path}/tars", f"{tmp_path}/urls.parquet"]


@pytest.mark.parametrize("options", [SlurmOptions(), SlurmOptions(array=2)])
@pytest.mark.parametrize("image", [None, "registry#image:1"])
def test_the_scripts_are_valid_bash_whose_directives_come_first(image: str | None, options: SlurmOptions) -> None:
    schedule = Schedule("slurm", "precompute", None, "/scratch/run1", HOSTILE, image=image, slurm=options)
    for text in render(schedule).values():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        lines = text.splitlines()
        assert lines[0] == "#!/bin/bash"
        first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        assert all(i < first_command for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert shlex.quote("registry#image:1") in text or image is None
