"""Predicts how long shards take to pass the stages: the real scheduler, driven on a clock that does not wait."""

import tempfile
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from pipeline.engine.ledger import Ledger
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import Scheduler
from pipeline.executors.base import ExecutionConfig
from pipeline.plan import Plan
from pipeline.planning.simulated_executor import SimulatedCluster, SimulatedExecutor, SimulatedStage, SimulationResult
from pipeline.signals import StopSignals
from pipeline.stage import Group, Shard, Stage, Task
from pipeline.storage.events import EventLog
from pipeline.storage.run_folder import Record, RunFolder


@dataclass(frozen=True, slots=True)
class SimulatedShard:
    """A shard: the stages it still needs, and its rows."""

    needs: tuple[str, ...]
    rows: int


def simulate(
    simulated_stages: Sequence[SimulatedStage], jobs: Sequence[SimulatedShard], machine: SimulatedCluster
) -> SimulationResult:
    """Runs the jobs through the stations."""
    executor = SimulatedExecutor(simulated_stages, machine)
    names = {simulated.name for simulated in simulated_stages}
    stages = tuple(_Counted(simulated, names) for simulated in simulated_stages)
    plan = Plan(stages, lambda: _shards(jobs), lambda *_: {})
    with tempfile.TemporaryDirectory(prefix="pipeline-plan-") as folder:
        run = _Simulated(folder, plan, jobs)
        events = EventLog(run.storage)
        try:
            progress, config = Progress(plan.stages, quiet=True), ExecutionConfig()
            Scheduler(plan, run, executor, events, progress, config, StopSignals()).execute()
        finally:
            events.close()
    return executor.simulation


class _Counted(Stage):
    """A stage that is only counted; its one group has its name."""

    def __init__(self, simulated: SimulatedStage, names: Set[str]):
        self.name = simulated.name
        self.inputs = tuple(name for name in simulated.after if name in names)
        self.groups = (Group(simulated.name, {}),)
        self.max_workers = simulated.workers

    def process(self, task: Task) -> None:
        raise AssertionError("played, not run")


def _shards(jobs: Sequence[SimulatedShard]) -> Iterator[Shard]:
    return (Shard(index, None, job.rows) for index, job in enumerate(jobs))


class _Simulated(RunFolder):
    """A run folder in which each job has what it does not need."""

    def __init__(self, folder: str, plan: Plan, jobs: Sequence[SimulatedShard]):
        super().__init__(folder)
        self.jobs = jobs
        self.fingerprints = Ledger(plan, RunFolder(folder)).fingerprints

    def read_record(self, group: str, shard: str) -> Record | None:
        job = self.jobs[int(shard)]
        if group in job.needs:
            return None
        return {
            "group": group,
            "fingerprint": self.fingerprints[group],
            "input": Shard(0, None, 0).digest,
            "rows": job.rows,
            "drops": {},
            "files": [],
            "counters": {},
            "info": {},
        }
