"""Counts the requests that a run makes to an object store: a real run, on one in memory."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from pipeline.options import RunOptions, WorkflowConfig
from pipeline.plan import Plan
from pipeline.stage import Group, GroupResult, Shard, Stage, Task
from pipeline.storage.run_folder import RunFolder
from pipeline.workflow import ShardedWorkflow

FEW, MANY = 10, 30
REQUESTS = {
    "cat_file": "GET",
    "get_file": "GET",
    "open": "GET",
    "info": "HEAD",
    "exists": "HEAD",
    "pipe_file": "PUT",
    "put_file": "PUT",
    "rm_file": "DELETE",
    "rm": "DELETE",
    "ls": "LIST",
    "find": "LIST",
}
"""Method of a file system -> the request that it is on S3; several deletions are one."""


def requests_a_shard() -> tuple[dict[str, float], dict[str, float], float]:
    """Requests per shard by kind, of a run and of the same command again; and how many of the run's the driver makes.

    Listings of folders, which grow by a request every 1,000 shards, are left out.
    """
    few, many = counted(FEW), counted(MANY)
    run, again = ({kind: (b[kind] - a[kind]) / (MANY - FEW) for kind in a | b} for a, b in zip(few, many, strict=True))
    driver = run.pop("driver")
    again.pop("driver")
    return (
        {"LIST": 0.0, "HEAD": 0.0, **run},
        {kind: again.get(kind, 0.0) for kind in {*REQUESTS.values()}},
        driver,
    )


class Bytes(Stage):
    """Reads its inputs and writes one byte per group."""

    def __init__(self, name: str, inputs: tuple[str, ...], groups: tuple[Group, ...]):
        self.name, self.inputs, self.groups = name, inputs, groups

    def process(self, task: Task) -> None:
        for group in self.inputs:
            task.input(group).read_bytes()
        for group in task.wanted:
            task.output(group, ".bin").write_bytes(b"x")
            task.done(group, GroupResult(1))


class Requests(ShardedWorkflow):
    name = "requests"
    summary = "the groups of precompute, a byte each"
    config_class = WorkflowConfig
    shards = 0

    def plan(self, run: RunFolder) -> Plan:
        lasting = tuple(Group(name, {}) for name in ("samples", "images-64", "images-256"))
        stages = (
            Bytes("fetch", (), (Group("originals", {}, transient=True),)),
            Bytes("resize", ("originals",), lasting),
            Bytes("encode", ("samples",), (Group("text-t5", {}),)),
        )
        return Plan(stages, lambda: (Shard(i, [i], 1) for i in range(self.shards)), lambda *_: {})


def counted(shards: int) -> tuple[Counter[str], Counter[str]]:
    """Requests of a run of the given number of shards, and of the same command again."""
    workflow = Requests(WorkflowConfig())
    workflow.shards = shards
    place, found = f"memory://scale-{time.time_ns()}", []
    for _ in range(2):
        with counting() as counts:
            workflow.run(place, RunOptions("inline", quiet=True))
        found.append(counts)
    return found[0], found[1]


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts what the file system in memory is asked for, as requests: those of the driver also as `driver`."""
    from fsspec.implementations.memory import MemoryFileSystem

    counts: Counter[str] = Counter()
    inside = threading.local()

    def counted(method: str, kind: str) -> Callable[..., Any]:
        original = getattr(MemoryFileSystem, method)

        def call(self: MemoryFileSystem, *arguments: Any, **options: Any) -> Any:
            if getattr(inside, "call", False):
                return original(self, *arguments, **options)
            inside.call = True
            try:
                counts[kind] += 1
                counts["driver"] += "run_task" not in _callers()
                return original(self, *arguments, **options)
            finally:
                inside.call = False

        return call

    with ExitStack() as patches:
        for method, kind in REQUESTS.items():
            patches.enter_context(mock.patch.object(MemoryFileSystem, method, counted(method, kind)))
        yield counts


def _callers() -> list[str]:
    frame, names = sys._getframe(2), []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names
