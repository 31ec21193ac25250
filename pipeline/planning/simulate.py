"""Predicts how long a run takes: the real scheduler, on a simulated clock."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.state import RunState
from pipeline.executors.base import ExecutionConfig
from pipeline.plan import Plan
from pipeline.planning.simulated_executor import (
    NodeEvent,
    SimulatedCluster,
    SimulatedExecutor,
    SimulatedStage,
    SimulationResult,
)
from pipeline.signals import StopSignals
from pipeline.stage import Group, Shard, Stage, Task
from pipeline.storage.events import EventLog
from pipeline.storage.record import Record
from pipeline.storage.run_folder import RunFolder
from pipeline.storage.scratch import temporary_folder


@dataclass(frozen=True, slots=True)
class SimulatedShard:
    """A shard: the stages it still needs, and its rows."""

    needs: tuple[str, ...]
    rows: int


def simulate(
    simulated_stages: Sequence[SimulatedStage],
    shards: Sequence[SimulatedShard],
    cluster: SimulatedCluster,
    node_events: Sequence[NodeEvent] = (),
) -> SimulationResult:
    """Runs the shards through the simulated stages, while nodes are lost and come back."""
    executor = SimulatedExecutor(simulated_stages, cluster, node_events=node_events)
    names = {simulated.name for simulated in simulated_stages}
    stages = tuple(_Counted(simulated, names) for simulated in simulated_stages)
    plan = Plan(stages, lambda: _shards(shards), lambda *_: {})
    with temporary_folder("pipeline-plan-") as folder:
        run = _SimulatedRun(str(folder), plan, shards)
        events = EventLog(run.storage)
        try:
            progress, config = Progress(plan.stages, quiet=True), ExecutionConfig()
            Scheduler(RunState(plan, run), executor, events, progress, config, StopSignals()).execute()
        finally:
            events.close()
    return executor.simulation


class _Counted(Stage):
    """A stage that is only counted; its only group has the stage's name."""

    def __init__(self, simulated: SimulatedStage, names: Set[str]):
        self.name = simulated.name
        self.inputs = tuple(name for name in simulated.after if name in names)
        self.groups = (Group(simulated.name, {}),)
        self.max_workers = simulated.workers

    def process(self, task: Task) -> None:
        raise AssertionError("simulated, not run")


def _shards(shards: Sequence[SimulatedShard]) -> Iterator[Shard]:
    return (Shard(index, None, shard.rows) for index, shard in enumerate(shards))


class _SimulatedRun(RunFolder):
    """A run folder in which each shard has the groups that it does not need."""

    def __init__(self, folder: str, plan: Plan, shards: Sequence[SimulatedShard]):
        super().__init__(folder)
        self.shards = shards
        self.digests = plan.digests

    def recorded_shards(self, group: str) -> Iterator[int]:
        return (index for index, shard in enumerate(self.shards) if group not in shard.needs)

    def read_record(self, group: str, shard: str) -> Record | None:
        simulated = self.shards[int(shard)]
        if group in simulated.needs:
            return None
        rows = simulated.rows
        return Record(group, int(shard), self.digests[group], Shard(0, None, 0).digest, input_rows=rows, rows=rows)
