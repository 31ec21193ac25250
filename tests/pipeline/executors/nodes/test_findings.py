"""What differs between a node and the machine where a run begins, and what will not work."""

import copy
from typing import Any

import pytest

from pipeline.executors.nodes.examine import examine_demands
from pipeline.executors.nodes.facts import Facts, node_facts
from pipeline.executors.nodes.findings import (
    CODE,
    DISTRIBUTION,
    Finding,
    NodeAnswer,
    clock_difference,
    differing,
    examine_answers,
    required_packages,
)
from pipeline.executors.ray_cluster import ClusterNode

GIB = 2**30
GPU = {"name": "H100", "memory_bytes": 80 * GIB, "free_bytes": 79 * GIB, "driver": "570.1"}
PLACES = {"encoders.0.model": "/models/t5"}
SOUND: Facts = {
    "versions": {DISTRIBUTION: "0.2.0", "python": "3.11.7", "ray": "2.60.0", "code": "abc", "torch": "2.9.0"},
    "gpus": [GPU],
    "gpu_problem": "",
    "shared_memory": {"folder": "/dev/shm", "total_bytes": 8 * GIB, "free_bytes": 8 * GIB},
    "temporary": {"folder": "/tmp", "total_bytes": 99 * GIB, "free_bytes": 99 * GIB, "problem": ""},
    "run_folder": {"folder": "/shared/run", "total_bytes": 99 * GIB, "free_bytes": 99 * GIB},
    "open_files": {"soft": 65536, "hard": 65536},
    "places": {"/models/t5": {"files": 7, "bytes": 11 * GIB, "sha256": "d", "problem": ""}},
}


def changed(path: str, value: object) -> Facts:
    """The facts of a sound node, but for one of them."""
    facts: Any = copy.deepcopy(SOUND)
    *above, last = path.split("|")
    for name in above:
        facts = facts[name]
    whole = facts if not above else None
    facts[last] = value
    return whole if whole is not None else _whole(above, facts)


def _whole(above: list[str], inner: Any) -> Facts:
    facts: Any = copy.deepcopy(SOUND)
    node = facts
    for name in above[:-1]:
        node = node[name]
    node[above[-1]] = inner
    return facts


def found(facts: Facts | None = None, here: Facts = SOUND, gpus: float = 1.0, **values: Any) -> list[Finding]:
    """What is not as it should be."""
    node = ClusterNode("3f2a91c0" * 7, {"CPU": 8.0, "GPU": gpus}, "worker7", "10.0.0.7")
    answer = NodeAnswer(node, **{"facts": SOUND if facts is None else facts, **values})
    return [finding for finding in examine_answers([answer], here, PLACES) if finding["status"] != "ok"]


def test_nothing_is_said_of_a_node_that_is_like_here() -> None:
    assert found() == []


def test_a_node_that_does_not_answer_is_named() -> None:
    node = ClusterNode("3f2a91c0" * 7, {}, "worker7", "10.0.0.7")
    (finding,) = examine_answers([NodeAnswer(node, problem="gives no answer within 60 s")], SOUND, PLACES)
    assert finding == {
        "node": "worker7 (10.0.0.7, 3f2a91c0)",
        "name": "reachable",
        "status": "bad",
        "message": "gives no answer within 60 s",
    }


@pytest.mark.parametrize(
    ("path", "value", "name", "status", "words"),
    [
        (f"versions|{DISTRIBUTION}", "0.1.0", "versions", "bad", "imagen-precompute 0.1.0 (here 0.2.0): install"),
        (f"versions|{DISTRIBUTION}", "", "versions", "bad", "imagen-precompute missing (here 0.2.0)"),
        ("versions|code", "abd", "versions", "bad", "other code of imagen-precompute 0.2.0"),
        ("versions|python", "3.12.1", "versions", "bad", "python 3.12.1 (here 3.11.7)"),
        ("versions|ray", "2.55.0", "versions", "bad", "ray 2.55.0 (here 2.60.0)"),
        ("versions|torch", "2.8.0", "versions", "note", "torch 2.8.0 (here 2.9.0): results may differ"),
        ("versions|torch", "", "versions", "bad", "torch missing (here 2.9.0)"),
        ("gpus", [], "gpus", "bad", "Ray offers 1, nvidia-smi shows 0"),
        ("gpus", [GPU, GPU], "gpus", "note", "2: H100, 80.0 GiB, driver 570.1; Ray offers 1 of them"),
        ("gpus", [{**GPU, "free_bytes": 9 * GIB}], "gpus", "note", "1 in use: 9.0 GiB free"),
        ("gpu_problem", "torch cannot use them: no kernel", "gpus", "bad", "torch cannot use them: no kernel"),
        ("shared_memory|free_bytes", 2**26, "/dev/shm", "note", "64.0 MiB free; start the container with --shm-size"),
        ("temporary|free_bytes", GIB, "temporary files", "note", "1.0 GiB free in /tmp"),
        ("temporary|free_bytes", 2**20, "temporary files", "bad", "1.0 MiB free in /tmp; set TMPDIR"),
        ("temporary|problem", "OSError: Read-only file system", "temporary files", "bad", "Read-only file system"),
        ("run_folder|free_bytes", GIB, "disk", "note", "1.0 GiB free at /shared/run"),
        ("run_folder|free_bytes", 0, "disk", "bad", "0 B free at /shared/run"),
        ("open_files|soft", 1024, "open files", "note", "1024 at once; ulimit -n 65536 before `ray start`"),
        (
            "places|/models/t5",
            {"problem": "there is no such file or folder"},
            "encoders.0.model",
            "bad",
            "no such file",
        ),
        (
            "places|/models/t5",
            {"files": 6, "bytes": GIB, "sha256": "e", "problem": ""},
            "encoders.0.model",
            "bad",
            "/models/t5: 6 files, 1.0 GiB; here 7 files, 11.0 GiB, of other names or sizes; copy it again",
        ),
    ],
)
def test_what_differs_is_named_with_the_remedy(path: str, value: object, name: str, status: str, words: str) -> None:
    (finding,) = found(changed(path, value))
    assert (finding["node"], finding["name"], finding["status"]) == ("worker7 (10.0.0.7, 3f2a91c0)", name, status)
    assert words in finding["message"]


def test_a_place_that_is_missing_here_will_not_work_either() -> None:
    (finding,) = found(here=changed("places|/models/t5", {"problem": "there is no such file or folder"}))
    assert (finding["name"], finding["status"]) == ("encoders.0.model", "bad")
    assert finding["message"].startswith("/models/t5: here there is no such file")


def test_a_run_folder_that_is_not_seen_will_not_work() -> None:
    (finding,) = found(unseen="there is no such folder")
    assert (finding["name"], finding["status"]) == ("run folder", "bad")
    assert "there is no such folder; mount the same file system at this path" in finding["message"]


@pytest.mark.parametrize(
    ("clock_s", "status", "words"),
    [(2.5, "note", "2.5 s ahead of"), (-61.0, "bad", "61.0 s behind"), (3600.0, "bad", "60.0 min ahead of")],
)
def test_a_clock_that_differs_is_named(clock_s: float, status: str, words: str) -> None:
    (finding,) = found(clock_s=clock_s)
    assert (finding["name"], finding["status"]) == ("clock", status)
    assert finding["message"].startswith(f"{words} the clock here; set both by NTP")
    assert found(clock_s=2.0) == found(clock_s=-2.0) == []


def test_a_clock_differs_by_what_its_way_cannot_explain() -> None:
    assert clock_difference(100.0, 100.4, 101.0) == 0.0
    assert clock_difference(100.0, 103.0, 101.0) == 2.0
    assert clock_difference(100.0, 93.0, 101.0) == -7.0


def test_code_is_compared_where_the_versions_are_equal() -> None:
    here = {DISTRIBUTION: "0.2.0", "code": "a"}
    assert differing({DISTRIBUTION: "0.2.0", "code": "b"}, here) == ["other code of imagen-precompute 0.2.0"]
    assert differing({DISTRIBUTION: "0.1.0", "code": "b"}, here) == ["imagen-precompute 0.1.0 (here 0.2.0)"]
    assert differing({DISTRIBUTION: "0.2.0", "code": ""}, here) == [], "it was being written when it was asked for"
    assert differing(here, here) == []


def test_what_no_node_has_is_named_with_the_stage() -> None:
    nodes = [ClusterNode("a", {"CPU": 4.0}), ClusterNode("b", {"CPU": 2.0, "GPU": 1.0})]
    demands = {"fetch": {"CPU": 1.0}, "encode-t5": {"GPU": 2.0}, "free": {}}
    assert [(f["name"], f["status"], f["message"]) for f in examine_demands(nodes, demands)] == [
        ("fetch", "ok", "2 of 2 nodes have CPU 1"),
        ("encode-t5", "bad", "needs GPU 2, and none of 2 nodes has it; start one that has, or ask for less"),
        ("free", "ok", "2 of 2 nodes have it"),
    ]


def test_this_machine_is_like_itself() -> None:
    facts = node_facts(required_packages(), CODE, "", [])
    node = ClusterNode("n" * 56, {"GPU": float(len(facts["gpus"]))})
    names = {finding["name"] for finding in examine_answers([NodeAnswer(node, facts=facts)], facts, {})}
    assert names == {"reachable", "versions", "gpus", "clock", "temporary files", "/dev/shm", "open files"}
    assert facts["versions"]["code"]
    assert all(facts["versions"].values()), "all that is required is installed"
