"""Asks every node of a Ray cluster what it is and has, before a run begins."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import MachineError, PipelineError, first_line
from pipeline.executors.nodes import facts as facts_module
from pipeline.executors.nodes.facts import Facts, NodeProbe, node_facts
from pipeline.executors.nodes.findings import (
    CODE,
    Finding,
    NodeAnswer,
    clock_difference,
    examine_answers,
    required_packages,
)
from pipeline.executors.ray_address import AUTO, meant_address
from pipeline.executors.ray_cluster import ClusterNode, Demand, connect, describe, leave
from pipeline.executors.ray_nodes import Token
from pipeline.storage import LocalStorage
from pipeline.storage.run_folder import RunFolder

log = logging.getLogger(__name__)

_PATIENCE_S = 60.0
"""For a process to start on a node."""
_GPU_PATIENCE_S = 240.0
"""The same where torch tries the GPUs."""
_CLOCK_S = 10.0


@contextmanager
def joined(address: str | None) -> Iterator[list[ClusterNode]]:
    """The nodes of the cluster that is meant, which is left at the end; none is ever started.

    Raises:
        MachineError: it cannot be reached, or there is none.
    """
    nodes = connect(None, meant_address(address) or AUTO)
    try:
        yield nodes
    finally:
        leave()


def examine_nodes(
    nodes: Sequence[ClusterNode], run: RunFolder | None, places: Mapping[str, str]
) -> tuple[list[NodeAnswer], list[Finding]]:
    """Asks all nodes at once, in a process of each that takes no CPU; it waits for a minute.

    Args:
        run: a run folder that all nodes must see; it need not exist, and is left as it was.
        places: key of the configuration -> path of a file or folder that every node must find.

    Returns:
        The answer of each node, and the findings of all.

    Raises:
        MachineError: the run folder cannot be written from here.
    """
    local = str(run.root) if run is not None and isinstance(run.storage, LocalStorage) else ""
    question = (list(required_packages()), CODE, local, sorted(set(places.values())))
    here = node_facts(*question)
    answers = _ask(nodes, question, run)
    return answers, examine_answers(answers, here, places)


def examine_demands(nodes: Sequence[ClusterNode], demands: Mapping[str, Demand]) -> list[Finding]:
    """Whether some node has what each stage requests."""
    findings = []
    for stage, demand in demands.items():
        fitting = sum(not demand or node.room(demand) > 0 for node in nodes)
        status, message = "ok", f"{fitting} of {len(nodes)} nodes have {describe(demand) or 'it'}"
        if not fitting:
            status = "bad"
            message = (
                f"needs {describe(demand)}, and none of {len(nodes)} nodes has it; start one that has, or ask for less"
            )
        findings.append({"node": "", "name": stage, "status": status, "message": message})
    return findings


def _ask(nodes: Sequence[ClusterNode], question: tuple[Any, ...], run: RunFolder | None) -> list[NodeAnswer]:
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cloudpickle.register_pickle_by_value(facts_module)
    probes, asked = {}, {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node.id, soft=False)
        probes[node.id] = ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=place).remote()
        asked[node.id] = probes[node.id].facts.remote(*question)
    wait_s = _GPU_PATIENCE_S if any(node.resources.get("GPU") for node in nodes) else _PATIENCE_S
    facts, problems = _collect(asked, wait_s)
    unseen = {} if run is None else _unseen({name: probes[name] for name in facts}, run)
    clocks = {name: _clock_s(probes[name]) for name in facts}
    for probe in probes.values():
        ray.kill(probe)
    return [
        NodeAnswer(
            node,
            problem=problems.get(node.id, ""),
            facts=facts.get(node.id),
            clock_s=clocks.get(node.id, 0.0),
            unseen=unseen.get(node.id, ""),
        )
        for node in nodes
    ]


def _collect(asked: Mapping[str, Any], wait_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """The answers by node, and why others gave none."""
    import ray
    from ray.exceptions import RayError

    answers, problems = {}, {}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=wait_s)
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=0)
        except TimeoutError:
            problems[name] = (
                f"gives no answer within {wait_s:.0f} s: no process starts there; see `ray status` and its logs"
            )
        except RayError as error:
            problems[name] = f"cannot answer: {_cause(error)}"
    return answers, problems


def _cause(error: Exception) -> str:
    """The last line of the error of a node, which says what it is, or the first one of Ray's own."""
    cause = getattr(error, "cause", None)
    return f"{type(cause).__name__}: {first_line(cause)}" if isinstance(cause, Exception) else first_line(error)


def _unseen(probes: Mapping[str, Any], run: RunFolder) -> dict[str, str]:
    """Node -> why it does not see the run folder; nodes that do are left out."""
    with _token(run) as token:
        asked = {name: probe.answer.remote(token, name) for name, probe in probes.items()}
        found, problems = _collect(asked, _PATIENCE_S)
        for name, problem in found.items():
            if not problem and not token.is_answered(name):
                problem = "what it writes there does not appear here"
            problems[name] = problem
    return {name: problem for name, problem in problems.items() if problem}


@contextmanager
def _token(run: RunFolder) -> Iterator[Token]:
    """A token in a run folder, where a run may be at work; the folder and those above it are removed if they were not
    there."""
    made: list[Path] = []
    if isinstance(run.storage, LocalStorage):
        made = [folder for folder in (run.storage.root, *run.storage.root.parents) if not folder.exists()]
    try:
        token = Token.write(run, alone=False)
    except (OSError, PipelineError) as error:
        raise MachineError(
            f"--out {run.url}: cannot be written from here ({type(error).__name__}: {first_line(error)}); mount it, "
            "or choose another folder"
        ) from error
    try:
        yield token
    finally:
        with suppress(OSError, PipelineError):
            token.delete()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _clock_s(probe: Any) -> float:
    """How far the clock of a node is ahead of this one, at least."""
    import ray
    from ray.exceptions import RayError

    try:
        sent = time.time()
        there = float(ray.get(probe.clock.remote(), timeout=_CLOCK_S))
        return clock_difference(sent, there, time.time())
    except (RayError, TimeoutError) as error:
        log.debug("no clock: %s", first_line(error))
        return 0.0


def report(
    address: str, nodes: Sequence[ClusterNode], answers: Sequence[NodeAnswer], findings: Sequence[Finding]
) -> dict[str, Any]:
    """Everything as JSON."""
    return {
        "address": address,
        "nodes": [
            {
                "node": answer.label,
                "id": answer.node.id,
                "host": answer.node.host,
                "address": answer.node.address,
                "resources": dict(answer.node.resources),
                "clock_s": answer.clock_s,
                "facts": _facts(answer.facts),
            }
            for answer in answers
        ],
        "checks": list(findings),
        "fit": not any(finding["status"] == "bad" for finding in findings),
        "num_nodes": len(nodes),
    }


def _facts(facts: Facts | None) -> Facts:
    return facts or {}
