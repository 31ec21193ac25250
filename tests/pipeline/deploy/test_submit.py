"""Runs as Ray jobs on a head that the test starts: progress, status, stop, exit codes, and no secret left behind."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.commands import Result, call
from tests.pipeline.executors.cluster import RayNodes, ray_nodes
from tests.runs import REPOSITORY, SMALL, command, precompute, store_bytes
from tests.workflows.test_train_and_sample import BASE


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path_factory.mktemp("s") / "n") as nodes:
        nodes.start("head", "--num-cpus=2")
        yield nodes


def start(cluster: RayNodes, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments, "--address", cluster.dashboard),
        env=cluster.environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ask(cluster: RayNodes, *arguments: str) -> Result:
    process = start(cluster, *arguments)
    out, err = process.communicate(timeout=240)
    return Result(process.returncode, out, err)


@pytest.mark.slow
@pytest.mark.ray
def test_a_submitted_run_ships_its_config_and_code_and_shows_its_progress(cluster: RayNodes, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = ask(cluster, "submit", "precompute", "--out", str(out), *SMALL)
    assert result.code == 0, result
    assert "finished: 19 of 20 samples in 3 shards" in result.out
    precompute(tmp_path / "here", *SMALL)
    assert store_bytes(out) == store_bytes(tmp_path / "here")
    packages = list(cluster.ray_folder.glob("session_latest/runtime_resources/working_dir_files/*/stages"))
    assert packages, "the nodes ran the code that was shipped"
    logs = [path for folder in (cluster.folder, cluster.ray_folder) for path in folder.rglob("*.log")]
    readable = "".join(path.read_text(errors="replace") for path in logs if path.is_file())
    assert "Ray runtime started" in readable
    assert cluster.token not in readable + result.out + result.err


@pytest.mark.slow
@pytest.mark.ray
def test_the_exit_code_of_the_run_is_that_of_submit(cluster: RayNodes, tmp_path: Path) -> None:
    missing = ["source.kind=urls", "source.path=/nowhere/urls.parquet"]
    result = ask(cluster, "submit", "precompute", "--out", str(tmp_path / "a"), *missing)
    assert result.code == 2
    assert "source.path: /nowhere/urls.parquet does not exist" in result.out
    result = ask(cluster, "submit", "precompute", "--out", str(tmp_path / "b"), *SMALL, "max_drop_fraction=0")
    assert result.code == 3
    assert "max_drop_fraction: 1 of 20 samples were dropped" in result.out


@pytest.mark.slow
@pytest.mark.ray
def test_training_is_submitted_alike(cluster: RayNodes, small_run: Path, tmp_path: Path) -> None:
    config = {**BASE, "store": str(small_run / "store")}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    result = ask(cluster, "submit", "train", "-c", str(tmp_path / "base.yaml"), "--out", str(tmp_path / "base"))
    assert result.code == 0, result
    assert "finished: " in result.out
    assert list((tmp_path / "base" / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.ray
def test_ctrl_c_leaves_the_job_alone_and_stop_ends_it(cluster: RayNodes, tmp_path: Path) -> None:
    process = start(cluster, "submit", "precompute", "--out", str(tmp_path / "run"), "source.num_samples=9000")
    while not list((tmp_path / "run").glob("state/*/*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    job = re.search(r"submitted (\S+)", errors)
    assert job is not None
    assert f"pipeline stop {job[1]} --address {cluster.dashboard}" in errors
    running = json.loads(ask(cluster, "status", job[1], "--json").out)
    assert (running["status"], running["exit_code"], running["workflow"]) == ("RUNNING", None, "precompute")
    stopped = json.loads(ask(cluster, "stop", job[1], "--json").out)
    assert (stopped["status"], stopped["exit_code"]) == ("STOPPED", 75)
    assert '"outcome": "stopped: PreemptedError"' in (tmp_path / "run" / "events.jsonl").read_text()
    assert ask(cluster, "status", "no-such-job").code == 2


@pytest.mark.slow
@pytest.mark.ray
def test_a_wrong_token_is_refused(cluster: RayNodes, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    environment = {**cluster.environment, "RAY_AUTH_TOKEN_PATH": str(wrong)}
    asked = command("status", "job", "--address", cluster.dashboard)
    result = subprocess.run(asked, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 4
    assert "RAY_AUTH_TOKEN_PATH" in result.stderr


def test_what_cannot_work_is_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    arguments = ["submit", "precompute", "--address", "http://127.0.0.1:9"]
    result = call(*arguments, "--out", "/shared/run", "images.sizes=[64]")
    assert result.code == 2
    assert "images.sizes: unknown key" in result.err
    result = call(*arguments, "--out", "runs/one")
    assert result.code == 2
    assert "--out runs/one: every node must access it" in result.err
    result = call("submit", "precompute", "--address", "head", "--out", "/shared/run")
    assert result.code == 2
    assert "--address head: must be an address of the head: http://HOST:PORT where it takes jobs" in result.err
    result = call(*arguments, "--out", "/shared/run")
    assert result.code == 4
    assert "--address http://127.0.0.1:9: " in result.err
