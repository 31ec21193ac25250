"""The scripts in the files for SkyPilot and dstack, run by bash with stubs in place of Ray, Python and `pipeline`."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.deploy.schedule import Schedule, install_command
from tests.commands import call
from tests.documents import blocks
from tests.pipeline.deploy.test_schedule import text_of
from tests.pipeline.deploy.test_schedule_clusters import OUT, VALUES
from tests.runs import REPOSITORY
from tests.test_docs import commands

STUBS = {
    "ray": """
trap 'echo "ray ended" >>"$CALLS"; exit 0' TERM
echo "ray $*" >>"$CALLS"
echo "$RAY_AUTH_MODE $RAY_USAGE_STATS_ENABLED" >"$CALLS.environment"
case "$*" in *--head*) ;; *) exit 1 ;; esac
while :; do /bin/sleep 0.02; done
""",
    "python": """
cat >"$CALLS.python"
until grep -q "^ray start" "$CALLS" && [ -s "$CALLS.environment" ]; do /bin/sleep 0.02; done
echo "python $2 $3" >>"$CALLS"
exit "${PYTHON_CODE:-0}"
""",
    "pipeline": """
echo pipeline >>"$CALLS"
printf '%s\\0' "$@" >"$CALLS.arguments"
read -r code <"$CALLS.codes"
sed -i 1d "$CALLS.codes"
if [ "$code" = wait ]; then
  trap 'touch "$CALLS.stopping"; exit 75' TERM
  touch "$CALLS.started"
  while :; do /bin/sleep 0.02; done
fi
exit "$code"
""",
    "sleep": """
echo "sleep $1" >>"$CALLS"
exec /bin/sleep 0.02
""",
}
NAMES = {
    "skypilot": ("SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_TASK_ID"),
    "dstack": ("DSTACK_MASTER_NODE_IP", "DSTACK_NODE_RANK", "DSTACK_NODES_NUM", "DSTACK_RUN_ID"),
}
"""What the places call the first node's address, the node's number, the number of nodes, and the job."""


def tree(kind: str, out: str = OUT, config: str | None = None) -> Any:
    return yaml.safe_load(text_of(Schedule(kind, "precompute", config, out, VALUES, image="registry/image:1")))


def script(kind: str) -> str:
    if kind == "skypilot":
        return tree(kind)["run"]
    (command,) = tree(kind)["commands"]
    return command


class Node:
    """A node of a job: its stubs on PATH, and the calls they note."""

    def __init__(self, root: Path, kind: str):
        self.calls_file = root / "calls"
        bin_folder = root / "bin dir"
        bin_folder.mkdir()
        for name, text in STUBS.items():
            (bin_folder / name).write_text(f"#!/bin/bash\n{text}")
            (bin_folder / name).chmod(0o755)
        address, rank, nodes, job = NAMES[kind]
        self.command = ["bash", *(["-i"] if kind == "dstack" else []), "-c", script(kind)]  # as dstack's runner does
        self.environment = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "HOME": str(root),
            address: "127.0.0.1\n127.0.0.9" if kind == "skypilot" else "127.0.0.1",
            rank: "0",
            nodes: "2",
            job: "job-1",
        }

    def run(self, *codes: int, **environment: str) -> int:
        return self.start(*codes, **environment).wait(60)

    def start(self, *codes: int | str, **environment: str) -> subprocess.Popen[bytes]:
        """`codes` are those of the runs; `wait` is a run that waits for SIGTERM and ends with 75."""
        Path(f"{self.calls_file}.codes").write_text("".join(f"{code}\n" for code in codes))
        return subprocess.Popen(self.command, env={**self.environment, **environment})

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def port(self) -> int:
        """Of the Ray of the job."""
        done = subprocess.run(["cksum"], input=b"job-1", capture_output=True, check=True)
        return 20000 + int(done.stdout.split()[0]) % 10000


@pytest.fixture(params=sorted(NAMES))
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Node:
    return Node(tmp_path, request.param)


def kind_of(node: Node) -> str:
    return "dstack" if "DSTACK_RUN_ID" in node.environment else "skypilot"


def wait_for(path: Path) -> None:
    give_up = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 130])
def test_the_first_node_starts_ray_on_its_own_ports_and_ends_with_the_code_of_the_run(node: Node, code: int) -> None:
    assert node.run(code) == code
    port = node.port()
    head = next(call for call in node.calls() if call.startswith("ray start"))
    options = dict(word.split("=") for word in head.split() if "=" in word)
    assert (options["--node-ip-address"], options["--port"]) == ("127.0.0.1", str(port))
    assert options["--include-dashboard"] == "false"
    taken = {6379, 6380, 8265, 8266, 10001, 52365}  # by other Rays, SkyPilot's own among them
    assert not taken & {port, int(options["--dashboard-agent-listen-port"])}
    assert 30000 <= int(options["--dashboard-agent-listen-port"]) < 32000
    assert f"python 127.0.0.1:{port} 2" in node.calls()  # waits for both nodes
    assert node.calls().count("pipeline") == 1
    assert node.calls()[-1] == "ray ended", "its own, not by `ray stop`, which ends SkyPilot's too"
    assert Path(f"{node.calls_file}.environment").read_text() == "token 0\n"


def test_the_run_gets_its_words_as_they_were_given_and_joins_that_ray(node: Node) -> None:
    assert node.run(0) == 0
    words = Path(f"{node.calls_file}.arguments").read_text(encoding="utf-8").split("\0")[:-1]
    joined = ["--executor", "ray", "--address", f"127.0.0.1:{node.port()}"]
    assert words == ["run", "precompute", "--out", OUT, *VALUES, *joined]


def test_dstack_and_sky_find_nothing_to_expand_in_the_script(node: Node) -> None:
    text = script(kind_of(node))
    assert "$$" not in text
    assert "${{" not in text


def test_another_node_joins_while_the_first_is_up(node: Node) -> None:
    rank = NAMES[kind_of(node)][1]
    with socket.create_server(("127.0.0.1", node.port())):
        process = node.start(**{rank: "1"})
        give_up = time.monotonic() + 60
        while sum(call.startswith("ray start") for call in node.calls()) < 2:  # again after it was lost
            assert time.monotonic() < give_up
            time.sleep(0.02)
    if kind_of(node) == "dstack":  # ends the task with the first node
        process.kill()
        process.wait(60)
    else:
        assert process.wait(60) == 0
    assert f"--address=127.0.0.1:{node.port()}" in node.calls()[0]
    assert "--head" not in node.calls()[0]
    assert "pipeline" not in node.calls()


def test_a_node_that_never_sees_the_first_ends_with_4(node: Node) -> None:
    rank = NAMES[kind_of(node)][1]
    assert node.run(**{rank: "1"}, SECONDS="601") == 4
    assert not any(call.startswith("ray") for call in node.calls())


def test_without_all_nodes_nothing_is_run(node: Node) -> None:
    assert node.run(0, PYTHON_CODE="1") == 4
    assert "pipeline" not in node.calls()
    assert node.calls()[-1] == "ray ended"


def test_an_image_without_the_program_is_named(node: Node) -> None:
    (Path(node.environment["PATH"].split(":")[0]) / "pipeline").unlink()
    done = subprocess.run(
        node.command, env={**node.environment, "PATH": f"{node.environment['PATH'].split(':')[0]}:/usr/bin:/bin"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert "error: no program 'pipeline' in this image\n" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_in_time(node: Node, number: signal.Signals) -> None:
    process = node.start("wait", 0)
    wait_for(Path(f"{node.calls_file}.started"))
    process.send_signal(number)
    assert process.wait(60) == 75
    assert Path(f"{node.calls_file}.stopping").exists()
    assert node.calls().count("pipeline") == 1
    assert node.calls()[-1] == "ray ended"


def test_dstack_continues_a_run_in_place_that_ended_with_75_but_no_other(tmp_path: Path) -> None:
    node = Node(tmp_path, "dstack")
    assert node.run(75, 75, 3) == 3
    assert [call for call in node.calls() if call in ("pipeline", "sleep 60")] == [
        "pipeline", "sleep 60", "pipeline", "sleep 60", "pipeline",
    ]  # fmt: skip
    assert sum(call.startswith("ray start") for call in node.calls()) == 1
    retry = tree("dstack")["retry"]
    assert sorted(retry["on_events"]) == ["interruption", "no-capacity"]


def test_skypilot_recovers_after_75_and_no_other_code(tmp_path: Path) -> None:
    node = Node(tmp_path, "skypilot")
    assert node.run(75, 0) == 75
    assert node.calls().count("pipeline") == 1
    assert tree("skypilot")["resources"]["job_recovery"] == {
        "recover_on_exit_codes": [75],
        "max_restarts_on_errors": 0,
    }


def test_the_token_of_ray_comes_from_the_launch_and_stands_in_no_file() -> None:
    assert tree("skypilot")["secrets"] == {"RAY_AUTH_TOKEN": None}
    assert tree("dstack")["env"] == ["RAY_AUTH_TOKEN"]
    for kind in NAMES:
        command = install_command(Schedule(kind, "precompute", out="s3://b/r", image="i"), ["a file.yaml"])
        assert command.startswith("RAY_AUTH_TOKEN=$(openssl rand -hex 32) ")
        assert command.endswith(" 'a file.yaml'")


def test_a_configuration_and_a_volume_are_mounted_where_the_command_looks(tmp_path: Path) -> None:
    config = tmp_path / "my config: {a}.yaml"
    config.write_text("shard_size: 7\n")
    sky, dstack = (tree(kind, config=str(config)) for kind in ("skypilot", "dstack"))
    assert sky["file_mounts"] == {"/etc/pipeline/config.yaml": str(config)}
    assert dstack["files"] == [{"local_path": str(config), "path": "/etc/pipeline/config.yaml"}]
    assert "--config /etc/pipeline/config.yaml " in sky["run"]
    assert sky["volumes"] == {"/mnt/my data": "precompute-run-1"}
    assert dstack["volumes"] == [{"name": "precompute-run-1", "path": "/mnt/my data"}]
    assert not {"volumes", "file_mounts", "files"} & {*tree("skypilot", "s3://b/r"), *tree("dstack", "s3://b/r")}


@pytest.mark.parametrize("page", ["kubernetes", "skypilot", "dstack"])
def test_a_page_shows_the_command_that_is_printed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("shard_size: 7\n")
    document = REPOSITORY / "docs" / "how-to" / f"{page}.md"
    found = call(*commands([document])[0][1:])
    assert found.code == 0, found.err
    path, install = found.out.splitlines()
    assert Path(path).is_file()
    assert blocks("text", [document])[0] == install.removeprefix("install: ")
