"""Compares the nodes of a cluster with the machine where a run begins: what differs, and what will not work."""

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from packaging.requirements import Requirement

from pipeline.executors.nodes.facts import Facts
from pipeline.executors.ray_cluster import ClusterNode
from pipeline.units import human_bytes, human_seconds

Finding = dict[str, str]
"""node (its label, or "" for the whole cluster), name, status (ok, note or bad) and message with the remedy."""

DISTRIBUTION = "imagen-precompute"
CODE = ("pipeline", "stages", "imagen_core", "workflows")
"""Packages whose files must be the same everywhere."""
_NAMED_BY_RUNS = ("pyarrow",)
_SAME = (DISTRIBUTION, "python", "ray", "code")
"""What must be equal on all nodes: tasks are pickled by one and unpickled by another."""
_CLOCK_NOTE_S, _CLOCK_BAD_S = 2.0, 60.0
_LITTLE_DISK, _NO_DISK = 10 * 2**30, 256 * 2**20
_LITTLE_SHARED_MEMORY = 2**30
_FEW_OPEN_FILES = 4096
_GPU_IN_USE = 0.1


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    """What a node answered."""

    node: ClusterNode
    problem: str = ""
    """Why there are no facts."""
    facts: Facts | None = None
    clock_s: float = 0.0
    """Its clock is ahead of the one here by at least this; negative: behind."""
    unseen: str = ""
    """Why it does not see the run folder; empty if it does, or none was given."""

    @property
    def label(self) -> str:
        return label(self.node)


def label(node: ClusterNode) -> str:
    """`worker7 (10.0.0.7, 3f2a91c0)`"""
    return f"{node.host} ({node.address}, {node.id[:8]})"


@cache
def required_packages() -> tuple[str, ...]:
    """The distribution itself and those that it requires."""
    found = [DISTRIBUTION]
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(requirement.name)
    return tuple(found)


def packages_named_by_runs() -> tuple[str, ...]:
    """The packages that each run compares by itself, in addition to Python and the code."""
    return (DISTRIBUTION, *_NAMED_BY_RUNS)


def clock_difference(sent: float, there: float, received: float) -> float:
    """By how much, at least, a clock is ahead (or, negative, behind): it was read between two moments here.

    Args:
        sent, there, received: Unix times in seconds; of this clock, the other one, and this one.
    """
    return max(there - received, 0.0) + min(there - sent, 0.0)


def differing(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """`pyarrow 21.0.0 (here 22.0.0)` for each package of another version; code counts if it is known and the versions
    are equal."""
    differences = []
    for name, version in here.items():
        other = there.get(name, "")
        if other == version or not version:
            continue
        if name == "code":
            if other and there.get(DISTRIBUTION) == here.get(DISTRIBUTION):
                differences.append(f"other code of {DISTRIBUTION} {here.get(DISTRIBUTION)}")
        else:
            differences.append(f"{name} {other or 'missing'} (here {version})")
    return differences


def examine_answers(answers: Sequence[NodeAnswer], here: Facts, places: Mapping[str, str]) -> list[Finding]:
    """All findings, node by node.

    Args:
        here: of the machine where the run begins.
        places: key of the configuration -> path that every node must find.
    """
    findings: list[Finding] = []
    for answer in answers:
        if answer.facts is None:
            findings.append(_finding(answer, "reachable", "bad", answer.problem))
            continue
        findings.append(_finding(answer, "reachable", "ok", "answers"))
        findings += _versions(answer, answer.facts, here)
        findings.append(_gpus(answer, answer.facts))
        if answer.facts["run_folder"]:
            findings.append(_run_folder(answer))
        findings += _places(answer, answer.facts, here, places)
        findings.append(_clock(answer))
        findings += _limits(answer, answer.facts)
    return findings


def _finding(answer: NodeAnswer, name: str, status: str, message: str) -> Finding:
    return {"node": answer.label, "name": name, "status": status, "message": message}


def _versions(answer: NodeAnswer, facts: Facts, here: Facts) -> Iterable[Finding]:
    there, mine = facts["versions"], here["versions"]
    must = differing(there, {name: mine.get(name, "") for name in _SAME})
    other = {name: version for name, version in mine.items() if name not in _SAME}
    must += differing(there, {name: version for name, version in other.items() if not there.get(name)})
    may = differing(there, {name: version for name, version in other.items() if there.get(name)})
    if must:
        yield _finding(answer, "versions", "bad", f"{', '.join(must)}: install there what is here")
    if may:
        yield _finding(answer, "versions", "note", f"{', '.join(may)}: results may differ in bytes; install the same")
    if not must and not may:
        yield _finding(answer, "versions", "ok", f"{DISTRIBUTION} {mine.get(DISTRIBUTION)}, Python {mine['python']}")


def _gpus(answer: NodeAnswer, facts: Facts) -> Finding:
    gpus, given = facts["gpus"], answer.node.resources.get("GPU", 0.0)
    names = ", ".join(sorted({f"{gpu['name']}, {_size(gpu['memory_bytes'])}" for gpu in gpus}))
    shown = f"{len(gpus)}: {names}, driver {gpus[0]['driver']}" if gpus else "none"
    if facts["gpu_problem"]:
        return _finding(
            answer, "gpus", "bad", f"{shown}; {facts['gpu_problem']}; mend the driver or install a fitting torch"
        )
    if given > len(gpus):
        return _finding(
            answer,
            "gpus",
            "bad",
            f"Ray offers {given:g}, nvidia-smi shows {len(gpus)}; start this node with --num-gpus={len(gpus)}",
        )
    if given < len(gpus):
        return _finding(
            answer,
            "gpus",
            "note",
            f"{shown}; Ray offers {given:g} of them; start this node with --num-gpus={len(gpus)}",
        )
    used = [gpu for gpu in gpus if (gpu["free_bytes"] or 0) < (1 - _GPU_IN_USE) * (gpu["memory_bytes"] or 0)]
    if used:
        return _finding(answer, "gpus", "note", f"{shown}; {len(used)} in use: {_size(used[0]['free_bytes'])} free")
    return _finding(answer, "gpus", "ok", shown)


def _size(number: int | None) -> str:
    return "unknown" if number is None else human_bytes(number)


def _run_folder(answer: NodeAnswer) -> Finding:
    if answer.unseen:
        remedy = "mount the same file system at this path on every node, or give --out an object store"
        return _finding(answer, "run folder", "bad", f"{answer.unseen}; {remedy}")
    return _finding(
        answer, "run folder", "ok", "a file of this machine is read there, and one renamed there is read here"
    )


def _places(answer: NodeAnswer, facts: Facts, here: Facts, places: Mapping[str, str]) -> Iterable[Finding]:
    for key, place in places.items():
        there, mine = facts["places"][place], here["places"][place]
        if there["problem"]:
            yield _finding(answer, key, "bad", f"{place}: {there['problem']}; put it at this path on every node")
        elif mine["problem"]:
            yield _finding(answer, key, "bad", f"{place}: here {mine['problem']}; put it at this path on every node")
        elif there["sha256"] != mine["sha256"]:
            yield _finding(
                answer,
                key,
                "bad",
                f"{place}: {there['files']} files, {human_bytes(there['bytes'])}; here {mine['files']} files, "
                f"{human_bytes(mine['bytes'])}, of other names or sizes; copy it again",
            )
        else:
            yield _finding(answer, key, "ok", f"{place}: {there['files']} files, {human_bytes(there['bytes'])}")


def _clock(answer: NodeAnswer) -> Finding:
    difference = abs(answer.clock_s)
    if difference <= _CLOCK_NOTE_S:
        return _finding(answer, "clock", "ok", f"within {_CLOCK_NOTE_S:g} s")
    status = "bad" if difference > _CLOCK_BAD_S else "note"
    way = "ahead of" if answer.clock_s > 0 else "behind"
    message = (
        f"{human_seconds(difference)} {way} the clock here; set both by NTP (chrony), as leases and times are compared"
    )
    return _finding(answer, "clock", status, message)


def _limits(answer: NodeAnswer, facts: Facts) -> Iterable[Finding]:
    temporary = facts["temporary"]
    folder, free = temporary["folder"], temporary["free_bytes"]
    if temporary["problem"]:
        yield _finding(
            answer, "temporary files", "bad", f"{folder}: {temporary['problem']}; set TMPDIR before `ray start`"
        )
    elif free < _LITTLE_DISK:
        status = "bad" if free < _NO_DISK else "note"
        yield _finding(
            answer, "temporary files", status, f"{human_bytes(free)} free in {folder}; set TMPDIR before `ray start`"
        )
    else:
        yield _finding(answer, "temporary files", "ok", f"{human_bytes(free)} free in {folder}")
    if facts["run_folder"] and facts["run_folder"]["free_bytes"] < _LITTLE_DISK:
        free = facts["run_folder"]["free_bytes"]
        status = "bad" if free < _NO_DISK else "note"
        yield _finding(
            answer, "disk", status, f"{human_bytes(free)} free at {facts['run_folder']['folder']}; make room"
        )
    shared = facts["shared_memory"]["free_bytes"]
    status = "note" if shared < _LITTLE_SHARED_MEMORY else "ok"
    remedy = "; start the container with --shm-size=8g" if status == "note" else ""
    yield _finding(answer, "/dev/shm", status, f"{human_bytes(shared)} free{remedy}")
    limit = facts["open_files"]["soft"]
    few = 0 <= limit < _FEW_OPEN_FILES
    remedy = f"; ulimit -n {_FEW_OPEN_FILES * 16} before `ray start`" if few else ""
    yield _finding(answer, "open files", "note" if few else "ok", f"{limit} at once{remedy}")
