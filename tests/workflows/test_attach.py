"""Runs join the Ray that is already there, wherever it listens, and start none of their own."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.executors.cluster import RayNodes, ray_nodes
from tests.pipeline.executors.machines import NETWORK, run_on_two_machines, skip_without_namespaces
from tests.runs import REPOSITORY, command, events, precompute, store_bytes

pytestmark = [pytest.mark.slow, pytest.mark.ray]

CONFIG = ["source.num_samples=40", "shard_size=8", "images.sizes_px=[16]"]
AGENT_PORTS = ["--dashboard-agent-grpc-port=23457", "--dashboard-agent-listen-port=23458"]
AGENT_PORTS += ["--metrics-export-port=23459", "--runtime-env-agent-port=23460"]
"""Without them Ray waits 15 s for its agents to choose some, which on a busy machine is too short."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of a run on this machine alone."""
    out = tmp_path_factory.mktemp("alone") / "run"
    precompute(out, *CONFIG)
    return store_bytes(out)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path_factory.mktemp("c") / "n") as nodes:
        nodes.start("head", "--num-cpus=2")
        yield nodes


@pytest.mark.timeout(900)
def test_under_a_symmetric_run_of_two_machines_a_run_uses_both_and_makes_the_same_store(
    tmp_path: Path, alone: dict[str, bytes]
) -> None:
    """The same line on both, without an address of Ray for `pipeline`."""
    skip_without_namespaces()
    out, head = tmp_path / "run", f"{NETWORK}.1:23456"
    script = (
        f"{shlex.join(command('doctor', '--cluster', '--json', '--out', str(out)))} > {tmp_path}/doctor.json && "
        f"{shlex.join(command('run', 'precompute', '--out', str(out), '--quiet', *CONFIG))}"
    )
    code, said = run_on_two_machines(
        tmp_path / "m",
        [
            *("ray", "symmetric-run", "--address", head, "--min-nodes", "2"),
            *("--num-cpus=1", "--object-store-memory=80000000", *AGENT_PORTS, "--", "sh", "-c", script),
        ],
        {"RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT": "120", "RAY_AUTH_MODE": "disabled"},
    )
    if "Failed to start Ray" in said[0] + said[1] or "Timed out waiting for other nodes" in said[0]:
        pytest.skip("Ray did not start on both machines: it waits 15 s for its agents, too short on a busy machine")
    assert (code, (tmp_path / "doctor.json").is_file()) == (0, True), "\n".join(said)
    examined = json.loads((tmp_path / "doctor.json").read_text())
    assert (examined["address"], examined["fit"]) == (head, True), examined["checks"]
    assert {node["address"] for node in examined["nodes"]} == {f"{NETWORK}.1", f"{NETWORK}.2"}
    assert f"Ray cluster: {head}" in said[0]
    assert store_bytes(out) == alone
    assert len({event["node"] for event in events(out) if event["event"] == "task"}) == 2


def ended(cluster: RayNodes, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        env={**cluster.environment, **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def ran(cluster: RayNodes, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return ended(cluster, command(*arguments), **environment)


def test_a_run_joins_the_cluster_of_ray_address(cluster: RayNodes, tmp_path: Path, alone: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    arguments = ["run", "precompute", "--out", str(out), "--executor", "ray", "--quiet", *CONFIG]
    result = ran(cluster, *arguments, RAY_ADDRESS=cluster.address)
    assert result.returncode == 0, result.stderr
    assert f"Ray cluster: {cluster.address}" in result.stderr
    assert store_bytes(out) == alone
    listed = ran(cluster, "doctor", "--cluster", "--json", "--address", cluster.address)
    nodes = {event["node"] for event in events(out) if event["event"] == "task"}
    assert nodes <= {node["id"] for node in json.loads(listed.stdout)["nodes"]}


def test_a_run_below_a_symmetric_run_uses_both_nodes_of_its_cluster(
    cluster: RayNodes, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    """The same without namespaces: a process with the command line of one is above, on a port that Ray chose."""
    if "second" not in cluster.nodes:
        cluster.start("second", "--num-cpus=2")
    out = tmp_path / "run"
    above = ["sh", "-c", 'shift 3; "$@"; exit $?', "symmetric-run", "--address", cluster.address, "--"]
    done = ended(cluster, [*above, *command("run", "precompute", "--out", str(out), "--quiet", *CONFIG)])
    assert done.returncode == 0, done.stderr
    assert f"Ray cluster: {cluster.address}" in done.stderr
    assert store_bytes(out) == alone
    assert len({event["node"] for event in events(out) if event["event"] == "task"}) == 2


def test_submit_asks_the_head_of_ray_address_where_jobs_are_taken(
    cluster: RayNodes, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    result = ran(cluster, "submit", "precompute", "--out", str(tmp_path / "run"), *CONFIG, RAY_ADDRESS=cluster.address)
    assert result.returncode == 0, result.stdout + result.stderr
    assert store_bytes(tmp_path / "run") == alone


def test_dead_addresses_end_in_one_line(cluster: RayNodes, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    for words in (["run", "precompute", "--executor", "ray", *out], ["submit", "precompute", *out]):
        result = ran(cluster, *words, RAY_ADDRESS="127.0.0.1:9")
        assert result.returncode == 4, result.stderr
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: {'RAY_ADDRESS=' if words[0] == 'run' else '--address '}127.0.0.1:9: "), line
        assert "refused" in line
        assert "Traceback" not in result.stderr


NOTEBOOK = """
import json, sys
import ray
from pipeline.options import RunOptions
from tests.pipeline.toy import Toy, ToyConfig
ray.init(address=sys.argv[1], log_to_driver=False)
Toy(ToyConfig()).run(sys.argv[2], RunOptions("ray", quiet=True))
assert ray.is_initialized()
print(json.dumps([node["NodeID"] for node in ray.nodes()]))
"""


def test_a_process_that_is_connected_already_stays_so(cluster: RayNodes, tmp_path: Path) -> None:
    done = ended(cluster, [sys.executable, "-c", NOTEBOOK, cluster.address, str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    used = {event["node"] for event in events(tmp_path / "run") if event["event"] == "task"}
    assert used <= set(json.loads(done.stdout.splitlines()[-1]))
