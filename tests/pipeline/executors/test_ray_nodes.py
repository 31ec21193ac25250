"""Nodes that do not see the run folder are named and get no work."""

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pipeline.errors import MachineError
from pipeline.executors import ray_nodes as module
from pipeline.executors.ray_cluster import ClusterNode
from pipeline.executors.ray_nodes import SeeingNodes, Token
from pipeline.options import RunOptions
from pipeline.storage.run_folder import RunFolder
from tests.pipeline.executors.cluster import ray_nodes
from tests.pipeline.toy import Toy, ToyConfig

GOOD = ClusterNode("g" * 56, {"CPU": 2.0}, "good", "10.0.0.1")
BLIND = ClusterNode("b" * 56, {"CPU": 2.0, "GPU": 1.0}, "blind", "10.0.0.2")
NAMED = "does not see the run folder and is not used"
OTHER = "a folder of this name is there, but without the file that this run wrote into it"


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.0)


@pytest.fixture
def seeing(tmp_path: Path) -> SeeingNodes:
    made = SeeingNodes(RunFolder(tmp_path / "run"))
    made._known = {node.id: node for node in (GOOD, BLIND)}
    return made


def as_seen_from(token: Token, place: Path) -> Token:
    """The same on a node where the run folder's path leads to another place."""
    return replace(token, run=RunFolder(place))


def test_a_node_that_sees_the_token_answers_and_leaves_nothing_else(tmp_path: Path) -> None:
    token = Token.write(RunFolder(tmp_path))
    assert not token.is_answered(GOOD.id)
    assert token.answer(GOOD.id) == token.problem() == token.problem_now() == ""
    assert token.is_answered(GOOD.id)
    token.delete()
    assert list(tmp_path.iterdir()) == []


def test_a_node_says_what_it_found_in_the_place_of_the_run_folder_and_writes_nothing(tmp_path: Path) -> None:
    token = Token.write(RunFolder(tmp_path / "run"))
    (tmp_path / "other").mkdir()
    assert as_seen_from(token, tmp_path / "other").answer(BLIND.id) == OTHER
    assert as_seen_from(token, tmp_path / "none").answer(BLIND.id) == "there is no such folder"
    assert not (tmp_path / "none").exists()
    assert not list((tmp_path / "other").iterdir())
    name = token._name("driver")
    (tmp_path / "other" / name).parent.mkdir()
    (tmp_path / "other" / name).write_text("another")
    assert as_seen_from(token, tmp_path / "other").problem() == f"{name} has another content there"


def test_each_run_has_a_token_of_its_own_and_removes_those_of_killed_ones(tmp_path: Path) -> None:
    first = Token.write(RunFolder(tmp_path))
    second = Token.write(RunFolder(tmp_path))
    assert first.problem() == OTHER
    assert second.problem() == ""
    assert len(list(tmp_path.iterdir())) == 1


def test_drivers_of_parts_leave_the_tokens_of_each_other_and_remove_their_own(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    with first.lock(part=1), second.lock(part=2):
        killed, of_second = Token.write(first), Token.write(second)
        of_first = Token.write(first)
        assert (of_first.problem(), of_second.problem()) == ("", "")
        assert not (tmp_path / f".nodes-{killed.value}").exists()


def test_a_node_whose_answer_does_not_arrive_is_blind(seeing: SeeingNodes, caplog: pytest.LogCaptureFixture) -> None:
    """It reads the folder of the driver and writes elsewhere, as into the upper layer of an overlay."""
    seeing._asked = {"reference": BLIND, "other": GOOD}
    seeing.token.answer(GOOD.id)
    with mock.patch("ray.get", return_value=""), caplog.at_level(logging.WARNING):
        assert seeing.take("reference")
        assert not seeing.take("other")
    assert seeing.seeing([GOOD, BLIND]) == [GOOD]
    assert seeing.selector() == {"ray.io/node-id": f"!in({BLIND.id})"}
    (said,) = caplog.messages
    assert said.startswith("node blind (10.0.0.2, bbbbbbbb) does not see the run folder and is not used: ")
    assert said.endswith("what it writes there does not appear here")
    assert not seeing.refuse(BLIND.id, "again"), "named once"


def test_a_run_ends_when_only_blind_nodes_have_what_a_stage_needs(seeing: SeeingNodes) -> None:
    demands = {"fetch": {"CPU": 1.0}, "encode": {"GPU": 1.0}, "waits": {"TPU": 1.0}}
    seeing.require([GOOD, BLIND], demands)
    seeing.refuse(BLIND.id, OTHER)
    seeing.require([GOOD, BLIND], {"fetch": {"CPU": 1.0}, "waits": {"TPU": 1.0}, "anywhere": {}})
    with pytest.raises(
        MachineError, match=r"no node with GPU 1 is left for encode.*: blind \(10.0.0.2, bbbbbbbb\): a"
    ):
        seeing.require([GOOD, BLIND], demands)
    with pytest.raises(MachineError, match="no node is left for anywhere"):
        seeing.require([BLIND], {"anywhere": {}})


def test_files_that_a_node_reports_are_looked_for(tmp_path: Path) -> None:
    Toy(ToyConfig()).run(tmp_path, RunOptions("inline", quiet=True))
    run = RunFolder(tmp_path)
    seeing, record = SeeingNodes(run), run.read_record("squares", "00000")
    assert record is not None
    assert seeing.are_here([record])
    (tmp_path / record.file.path).write_text("half")
    assert not seeing.are_here([record])
    (tmp_path / record.file.path).unlink()
    assert not seeing.are_here([record])
    assert seeing.are_here([replace(record, files=())])
    run.storage.delete(run.record_name("squares", "00000"))
    assert not seeing.are_here([replace(record, files=())])


DRIVER = """
import json, logging, sys
from pipeline.errors import PipelineError
from pipeline.options import RunOptions
from tests.pipeline.toy import Toy, ToyConfig
logging.basicConfig(format="%(created)f %(message)s")
out, address, options = sys.argv[1:]
try:
    Toy(ToyConfig.model_validate(json.loads(options))).run(out, RunOptions("ray", address or None, quiet=True))
except PipelineError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Four nodes. Behind one path lies the disk of the current folder of each process: its own, or a shared one."""
    top = tmp_path_factory.mktemp("v")
    (top / "shared" / "run").mkdir(parents=True)
    (top / "run").symlink_to("/proc/self/cwd/disk/run")
    found: dict[str, Any] = {"top": top}
    for name in ("head", "a", "b", "blind", "driver"):
        view = found[name] = top / name
        view.mkdir()
        if name in ("blind", "driver"):
            (view / "disk" / "run").mkdir(parents=True)
        else:
            (view / "disk").symlink_to(top / "shared")
    with ray_nodes(top / "n") as nodes:
        for name in ("head", "a", "b", "blind"):
            nodes.start(name, "--num-cpus=1", folder=found[name])
        yield found | {"nodes": nodes}


def run_in(views: dict[str, Any], name: str, gate: Path | None = None) -> tuple[int, list[str]]:
    """The end and the words of a driver in a node's folder; `gate` opens when a node is named."""
    options = json.dumps({"toy": {"num_shards": 24, "add_cubes": True, "gate": str(gate or "")}})
    said: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(views["top"] / "run"), views["nodes"].address, options],
        env=views["nodes"].environment,
        cwd=views[name],
        stderr=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stderr is not None
        for line in driver.stderr:
            said.append(line.rstrip())
            if gate is not None and NAMED in line:
                gate.touch()
    return driver.returncode, said


@pytest.mark.slow
@pytest.mark.ray
def test_one_node_of_four_that_sees_another_disk_is_named_and_the_others_finish(
    views: dict[str, Any], tmp_path: Path
) -> None:
    code, said = run_in(views, "head", tmp_path / "gate")
    out, config = views["top"] / "shared" / "run", {"toy": {"num_shards": 24, "add_cubes": True}}
    assert code == 0, said
    named = [line for line in said if NAMED in line]
    assert len(named) == 1
    assert named[0].endswith(f"{views['top'] / 'run'}: {OTHER}")
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    print("named after", float(named[0].split()[0]) - events[0]["time"], "s")
    assert not list((views["blind"] / "disk" / "run").iterdir()), "nothing is done there"
    Toy(ToyConfig.model_validate(config)).run(tmp_path / "one", RunOptions("inline", quiet=True))
    for group in ("squares", "cubes"):
        made = {path.name: path.read_bytes() for path in (out / "store" / group).iterdir()}
        assert made == {path.name: path.read_bytes() for path in (tmp_path / "one" / "store" / group).iterdir()}
    assert len({event["node"] for event in events if event["event"] == "task"}) == 3
    assert not list(out.glob(".nodes-*"))


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_whose_folder_no_node_sees_ends_with_words_and_counts_nothing(views: dict[str, Any]) -> None:
    began = time.monotonic()
    code, said = run_in(views, "driver")
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert code == 4, said
    assert sum(NAMED in line for line in said) == 4
    assert f"is left for fetch, as these do not see this folder: {socket.gethostname()} (127.0.0.1" in said[-1]
    out = views["driver"] / "disk" / "run"
    assert not (out / "summary.json").exists()
    assert not list(out.glob("state/*/*.json"))
    assert not list(out.glob("store/*/*"))
    assert os.listdir(views["blind"] / "disk" / "run") == []
