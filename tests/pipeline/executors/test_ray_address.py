"""Which Ray is joined: the one that was named, or in which the process was started."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from pipeline.errors import ConfigError, MachineError
from pipeline.executors import ray_address as module
from pipeline.executors.ray_address import (
    check_joinable,
    commands_above,
    jobs_url,
    meant_address,
    named,
    running_address,
    symmetric_address,
)
from pipeline.options import RunOptions
from tests.image_server import serve, status

SYMMETRIC = ["python", "/bin/ray", "symmetric-run", "--address", "10.0.0.1:7001", "--min-nodes", "2"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(module, "commands_above", lambda: iter(()))
    monkeypatch.setattr(module, "_connected_address", lambda: None)


def test_what_is_given_counts_before_what_is_around(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meant_address(None) is None
    assert meant_address("auto") == "auto"
    monkeypatch.setattr(module, "_connected_address", lambda: "10.0.0.3:7003")
    assert meant_address(None) == meant_address("auto") == "10.0.0.3:7003"
    monkeypatch.setattr(module, "commands_above", lambda: iter([["bash"], [*SYMMETRIC, "--", "pipeline"]]))
    assert meant_address(None) == meant_address("auto") == "10.0.0.1:7001"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:7002")
    assert meant_address(None) == meant_address("auto") == "10.0.0.2:7002"
    assert meant_address("10.0.0.4:7004") == "10.0.0.4:7004"
    assert meant_address("local") is None, "Ray's word for one of its own"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert meant_address(None) is None


def test_only_the_ray_executor_looks_for_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:7002")
    assert RunOptions("ray").cluster == "10.0.0.2:7002"
    assert RunOptions("local").cluster is None


def test_messages_name_the_variable_that_an_address_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:7002")
    assert named("10.0.0.2:7002") == "RAY_ADDRESS=10.0.0.2:7002"
    assert named("10.0.0.3:7002") == "--address 10.0.0.3:7002"


@pytest.mark.parametrize(
    ("commands", "address"),
    [
        ([], None),
        ([["bash", "-c", "ray symmetric-run --address a:1 -- x"], ["init"]], None),
        ([["bash"], [*SYMMETRIC, "--", "pipeline", "run"]], "10.0.0.1:7001"),
        ([["timeout", "60", "ray", "symmetric-run", "--address=h:7", "--", "x", "--address", "other:1"]], "h:7"),
        ([["runner", "--", "symmetric-run", "--address", "a:1"]], None),
        ([["ray", "symmetric-run", "--address"], SYMMETRIC], None),
    ],
)
def test_the_symmetric_run_above_a_process_says_its_address(commands: list[list[str]], address: str | None) -> None:
    assert symmetric_address(iter(commands)) == address


def test_the_command_lines_above_a_process_are_read_from_proc(tmp_path: Path) -> None:
    script = tmp_path / "symmetric-run"
    script.write_text('"$PYTHON" -c "$CODE"; true\n')
    code = "from pipeline.executors.ray_address import *; print(meant_address(None), sum(1 for _ in commands_above()))"
    done = subprocess.run(
        ["env", f"PYTHON={sys.executable}", f"CODE={code}", "sh", str(script), "symmetric-run", "--address", "h:7"],
        capture_output=True,
        text=True,
        check=True,
    )
    address, count = done.stdout.split()
    assert address == "h:7"
    assert int(count) == sum(1 for _ in commands_above()) + 2, "of this process, and of the shell"


@pytest.mark.parametrize("address", ["http://10.0.0.1:7001", "ray://10.0.0.1:7001", "10.0.0.1", "head"])
def test_an_address_that_is_none_of_a_head_is_refused_before_ray_tries_it(address: str) -> None:
    with pytest.raises(ConfigError, match=rf"--address {address}: a run joins .* HOST:PORT .* `pipeline submit`"):
        check_joinable(address)


@pytest.fixture
def http_server() -> Iterator[str]:
    with serve({"/api/version": status(401)}) as server:
        yield server.url("").removeprefix("http://").rstrip("/")


def test_the_address_where_jobs_are_submitted_is_not_joined(http_server: str) -> None:
    with pytest.raises(ConfigError, match=f"--address {http_server}: jobs are submitted there"):
        check_joinable(http_server)
    assert jobs_url(http_server) == jobs_url(f"http://{http_server}") == f"http://{http_server}"


def test_nobody_listens_is_an_error_of_the_system() -> None:
    with pytest.raises(OSError, match="refused"):
        check_joinable("127.0.0.1:9")
    with pytest.raises(OSError, match="refused"):
        jobs_url("127.0.0.1:9")


def test_jobs_are_not_submitted_through_rays_client() -> None:
    with pytest.raises(ConfigError, match="--address ray://h:10001: must be an address of the head"):
        jobs_url("ray://h:10001")


@pytest.mark.parametrize(
    ("running", "latest", "found"),
    [
        ({"a:1"}, None, "a:1"),
        ({"a:1"}, "gone:9", "a:1"),
        ({"a:1", "b:2"}, "b:2", "b:2"),
        ({"a:1", "b:2"}, "gone:9", r"several Ray clusters run on this machine \(a:1, b:2\); give one"),
        (set(), "gone:9", "no Ray runs on this machine; start it"),
    ],
)
def test_auto_is_the_cluster_of_this_machine_and_never_any_of_several(
    monkeypatch: pytest.MonkeyPatch, running: set[str], latest: str | None, found: str
) -> None:
    from ray._private import services, utils

    monkeypatch.setattr(services, "find_gcs_addresses", mock.Mock(return_value=frozenset(running)))
    monkeypatch.setattr(utils, "read_ray_address", lambda: latest)
    if found in running:
        assert running_address() == found
    else:
        with pytest.raises(MachineError, match=f"--address auto: .*{found}"):
            running_address()
