"""On a Ray cluster of two nodes on this machine: the run spreads over both, and outlives one of them."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.executors.cluster import RayNodes, open_ports, ray_nodes
from tests.processes import descendants
from tests.runs import REPOSITORY, command, events, precompute, store_bytes

pytestmark = [pytest.mark.slow, pytest.mark.ray]

CONFIG = ["source.num_samples=480", "shard_size=24", "images.sizes_px=[32,64]"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path_factory.mktemp("c") / "n") as nodes:
        nodes.start("head", "--num-cpus=2", '--resources={"cpu_node": 1}')
        yield nodes


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("reference") / "run"
    precompute(out, *CONFIG)
    return store_bytes(out)


def start(cluster: RayNodes, out: Path, *overrides: str) -> subprocess.Popen[str]:
    """`pipeline run precompute` on the cluster, in its own process."""
    arguments = command("run", "precompute", "--out", str(out), "--address", cluster.address, *CONFIG, *overrides)
    return subprocess.Popen(arguments, env=cluster.environment, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def nodes_of(out: Path, stage: str) -> set[object]:
    return {event["node"] for event in events(out) if event["event"] == "task" and event["stage"] == stage}


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return errors


def test_stages_run_on_the_nodes_that_have_what_they_ask_for(
    cluster: RayNodes, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    """Two workers of half a GPU each share the one GPU; everything else stays off its node."""
    cluster.start("gpu", "--num-cpus=2", "--num-gpus=1", '--resources={"accelerator_type:H100": 1}')
    options = [
        "execution.resources={cpu_node: 0.001}",
        "encoders.0.num_gpus=0.5",
        "encoders.0.num_cpus=0.5",
        "encoders.0.resources={'accelerator_type:H100': 0.001}",
    ]
    finish(start(cluster, tmp_path / "run", *options))
    assert store_bytes(tmp_path / "run") == uninterrupted
    (fetch,), (encode,) = nodes_of(tmp_path / "run", "fetch"), nodes_of(tmp_path / "run", "encode-t5")
    assert nodes_of(tmp_path / "run", "resize") == {fetch}
    assert encode != fetch
    assert not open_ports(set(descendants(os.getpid()))), "a node listens beyond the loopback interface"


def test_a_node_that_is_killed_costs_nothing_but_time(
    cluster: RayNodes, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    """The only node with a GPU dies; the run says what it waits for, and continues when another one joins."""
    if "gpu" not in cluster.nodes:
        cluster.start("gpu", "--num-cpus=2", "--num-gpus=1")
    out = tmp_path / "run"
    process = start(cluster, out, "execution.max_attempts=1")
    finished = out / "state" / "text-t5"
    while not list(finished.glob("*.json")) or not nodes_of(out, "encode-t5"):  # the driver knows of it too
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    cluster.kill("gpu")
    time.sleep(15)
    assert process.poll() is None, "the encoder needs a GPU, so the run waits"
    cluster.start("gpu", "--num-cpus=2", "--num-gpus=1")
    errors = finish(process)
    assert "encode-t5 waits for a node with CPU 1, GPU 1: of 1 nodes none has it" in errors
    assert store_bytes(out) == uninterrupted
    assert len(nodes_of(out, "encode-t5")) == 2
    assert json.loads((out / "summary.json").read_text())["tally"]["shards_failed"] == 0
