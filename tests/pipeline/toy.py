"""A small plan of toy stages, importable by worker processes."""

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from pipeline import stage as stage_module
from pipeline.config import Config
from pipeline.errors import MachineError
from pipeline.executors import watchdog
from pipeline.options import WorkflowConfig
from pipeline.plan import Plan
from pipeline.stage import Drop, Group, GroupResult, Resources, Shard, Stage, Task
from pipeline.storage.run_folder import RunFolder
from pipeline.workflow import ShardedWorkflow


class ToyOptions(Config):
    num_shards: int = 5
    rows: int = 4
    factor: int = 2
    """Part of the `squares` group's fingerprint."""
    fail_shards: tuple[int, ...] = ()
    """`square` raises on these shards."""
    kill_shard: int = -1
    """`square` kills its own process once on this shard."""
    deadly_shard: int = -1
    """`square` kills its own process each time on this shard."""
    hanging_shard: int = -1
    """`square` hangs once on this shard."""
    holds_interpreter: bool = False
    """While it hangs, no other thread of Python runs."""
    gate: str = ""
    """A file that `square` waits for."""
    broken_setup: bool = False
    trace: str = ""
    """Folder where stages leave a mark for each call."""
    add_cubes: bool = False
    keep: bool = False
    meet: bool = False
    """`cube` waits until two of its tasks are under way at once."""
    modules: tuple[str, ...] = ()
    """Large packages of `square`; then it and `fetch` leave a mark with their process and that one's parent."""
    fetch_awaits: str = ""
    """`fetch` ends only when a mark that begins with this is there."""
    fetch_waits: bool = False
    """`fetch` takes half a CPU; of all shards but the first it waits until a shard is squared."""


class Fetch(Stage):
    name = "fetch"
    groups = (Group("raw", {"kind": "raw"}, transient=True),)

    def __init__(self, options: ToyOptions):
        self.options = options
        self.resources = Resources(num_cpus=0.5 if options.fetch_waits else 1)

    def process(self, task: Task) -> None:
        mark(self.options, f"fetch-{task.shard.name}-in-{os.getpid()}")
        if self.options.modules:
            mark(self.options, f"worker-{os.getpid()}-of-{os.getppid()}")
        wait_for_marks(self.options, self.options.fetch_awaits, 1 if self.options.fetch_awaits else 0)
        if self.options.fetch_waits and task.shard.index:
            wait_for_marks(self.options, "square", 1)
        rows = cast(list[int], task.shard.rows)
        task.output("raw", ".txt").write_text("\n".join(map(str, rows)))
        task.done("raw", GroupResult(len(rows)))


class Square(Stage):
    name = "square"
    inputs = ("raw",)

    def __init__(self, options: ToyOptions):
        self.options = options
        self.groups = (Group("squares", {"factor": options.factor}),)
        self.modules = options.modules

    def process(self, task: Task) -> None:
        options, shard = self.options, task.shard
        mark(options, f"square-{shard.name}")
        if options.modules:
            mark(options, f"worker-{os.getpid()}-of-{os.getppid()}")
        wait_for(options.gate)
        if shard.index in options.fail_shards:
            raise ValueError(f"cannot square shard {shard.index}")
        if shard.index == options.kill_shard and not (Path(options.trace) / "killed").exists():
            (Path(options.trace) / "killed").touch()
            os.kill(os.getpid(), 9)
        if shard.index == options.hanging_shard:
            hang_once(Path(options.trace), holds_interpreter=options.holds_interpreter)
        if shard.index == options.deadly_shard:
            os.kill(os.getpid(), 9)
        values = [int(v) for v in task.input("raw").read_text().split()]
        kept = [v for v in values if v % 10 != 7]
        drops = [Drop(i, str(v), "ends_in_seven") for i, v in enumerate(values) if v % 10 == 7]
        task.output("squares", ".txt").write_text("\n".join(str(options.factor * v * v) for v in kept))
        task.done("squares", GroupResult(len(kept), drops, {"sum": sum(kept)}))


class Cube(Stage):
    name = "cube"
    inputs = ("squares",)
    groups = (Group("cubes", {"kind": "cubes"}),)
    max_workers = 1

    def __init__(self, options: ToyOptions):
        self.options = options
        self.offset: int | None = None
        self.tasks_per_worker = 2 if options.meet else 1

    def setup(self, run: RunFolder) -> None:
        if self.options.broken_setup:
            raise MachineError("toy.model: not found; give another one")
        mark(self.options, f"setup-{os.getpid()}")
        self.offset = 100

    def process(self, task: Task) -> None:
        assert self.offset is not None
        mark(self.options, f"cube-{task.shard.name}")
        deadline = time.monotonic() + 30
        while self.options.meet and marks(Path(self.options.trace), "cube") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        mark(self.options, f"done-{task.shard.name}")
        values = task.input("squares").read_text().split()
        task.output("cubes", ".txt").write_text("\n".join(str(int(v) + self.offset) for v in values))
        task.done("cubes", GroupResult(len(values)))


class ToyConfig(WorkflowConfig):
    toy: ToyOptions = ToyOptions()


class Toy(ShardedWorkflow):
    name = "toy"
    summary = "squares"
    config_class = ToyConfig
    config: ToyConfig

    def plan(self, run: RunFolder) -> Plan:
        options = self.config.toy
        stages: tuple[Stage, ...] = (Fetch(options), Square(options))
        if options.add_cubes:
            stages = (*stages, Cube(options))
        return Plan(
            stages=stages,
            shards=lambda: toy_shards(options),
            finalize=lambda run, *_: {"num_samples": sum(record.rows for record in run.records("squares"))},
            row_group="squares",
            keep=frozenset(["raw"]) if options.keep else frozenset(),
        )


def toy_shards(options: ToyOptions) -> Iterator[Shard]:
    for index in range(options.num_shards):
        rows = list(range(index * options.rows, (index + 1) * options.rows))
        yield Shard(index, rows, len(rows))


def wait_for(gate: str) -> None:
    deadline = time.monotonic() + 30
    while gate and not Path(gate).exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def wait_for_marks(options: ToyOptions, prefix: str, number: int) -> None:
    deadline = time.monotonic() + 60
    while marks(Path(options.trace), prefix) < number:
        assert time.monotonic() < deadline, f"no mark {prefix}"
        time.sleep(0.01)


def hang_once(trace: Path, *, holds_interpreter: bool) -> None:
    """Hangs, as if for 12 days already."""
    if (trace / "hung").exists():
        return
    (trace / "hung").touch()
    with watchdog._watchdog._changed:
        stage_module._last_sign -= 1e6
        watchdog._GRACE_S = 1.0
        watchdog._watchdog._arm()
        if not holds_interpreter:
            watchdog._watchdog._changed.notify()
    (ctypes.PyDLL if holds_interpreter else ctypes.CDLL)(None).sleep(60)


def mark(options: ToyOptions, name: str) -> None:
    if options.trace:
        (Path(options.trace) / f"{name}-{time.monotonic_ns()}").touch()


def marks(folder: Path, prefix: str) -> int:
    return len(list(folder.glob(f"{prefix}-*")))
