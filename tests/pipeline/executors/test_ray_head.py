"""A run whose Ray head is killed ends soon with words and the exit code of what can be run again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import EXIT_PREEMPTED
from tests.network import guarded
from tests.pipeline.executors.cluster import REPOSITORY, ray_nodes
from tests.pipeline.executors.test_ray_nodes import DRIVER
from tests.processes import descendants

pytestmark = [pytest.mark.slow, pytest.mark.ray]
_HEAD = "gcs_server"


def last_words(out: Path, address: str | None, environment: dict[str, str], above: int | None) -> str:
    """What a driver says whose head is killed in the middle of its run; the same command then finishes it inline."""
    trace = out.with_name(f"{out.name}-trace")
    trace.mkdir()
    toy = {"num_shards": 6, "gate": str(out.with_name(f"{out.name}-gate")), "trace": str(trace)}
    command = [sys.executable, "-c", DRIVER, str(out), address or "", json.dumps({"toy": toy})]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stderr is not None
        deadline = time.monotonic() + 120
        while not list(trace.glob("square-*")):
            assert driver.poll() is None, driver.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (head,) = (pid for pid, line in descendants(above or driver.pid).items() if _HEAD in line.partition(" ")[0])
        os.kill(head, signal.SIGKILL)
        began = time.monotonic()
        said = driver.stderr.read()
    print(f"ended {time.monotonic() - began:.1f} s after its head")
    assert driver.returncode == EXIT_PREEMPTED, said
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_a_run_whose_own_head_is_killed_can_be_run_again(tmp_path: Path) -> None:
    environment = {**os.environ, **guarded(REPOSITORY), "RAY_ADDRESS": ""}
    said = last_words(tmp_path / "run", None, environment, None)
    assert said.startswith("the head of the local Ray (gcs_server) has ended: killed, or out of memory. Finished work")


def test_a_run_whose_head_is_started_again_at_the_same_address_can_be_run_again(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        head = ("head", f"--port={free.getsockname()[1]}", "--num-cpus=2", "--include-dashboard=false")
    trace, toy = (
        tmp_path / "trace",
        {"num_shards": 6, "gate": str(tmp_path / "gate"), "trace": str(tmp_path / "trace")},
    )
    trace.mkdir()
    with ray_nodes(tmp_path / "a") as first, ray_nodes(tmp_path / "b") as second:
        (second.folder / "token").write_text(first.token)
        first.start(*head)
        command = [sys.executable, "-c", DRIVER, str(tmp_path / "run"), first.address, json.dumps({"toy": toy})]
        with subprocess.Popen(command, env=first.environment, stderr=subprocess.PIPE, text=True) as driver:
            assert driver.stderr is not None
            deadline = time.monotonic() + 120
            while not list(trace.glob("square-*")):
                assert driver.poll() is None, driver.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            first.kill("head")
            second.start(*head)
            assert second.address == first.address
            said = driver.stderr.read()
    assert driver.returncode == EXIT_PREEMPTED, said
    assert "run the same command again" in said.splitlines()[-1]


def test_a_run_on_a_cluster_whose_head_is_killed_can_be_run_again(tmp_path: Path) -> None:
    with ray_nodes(tmp_path / "n") as nodes:
        nodes.start("head", "--num-cpus=2")
        above = nodes.nodes["head"].pid
        said = last_words(tmp_path / "run", nodes.address, nodes.environment, above)
    assert said.startswith(f"the head of the Ray cluster ({nodes.address}) was not reached for 3")
    assert "run the same command again once the cluster is back" in said
