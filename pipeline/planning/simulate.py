"""Predicts how long shards take to pass the stages: the real scheduler, driven on a clock that does not wait."""

import tempfile
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from pipeline.engine.ledger import Ledger
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import Scheduler
from pipeline.executors.base import ExecutionConfig
from pipeline.plan import Plan
from pipeline.planning.simulated_executor import Machine, Played, SimulatedExecutor, Station
from pipeline.signals import StopSignals
from pipeline.stage import Group, Shard, Stage, Task
from pipeline.storage.events import EventLog
from pipeline.storage.run_folder import Record, RunFolder


@dataclass(frozen=True, slots=True)
class Job:
    """A shard: the stages it still needs, and its rows."""

    needs: tuple[str, ...]
    rows: int


def play(stations: Sequence[Station], jobs: Sequence[Job], machine: Machine) -> Played:
    """Runs the jobs through the stations."""
    executor = SimulatedExecutor(stations, machine)
    names = {station.name for station in stations}
    stages = tuple(_Counted(station, names) for station in stations)
    plan = Plan(stages, lambda: _shards(jobs), lambda *_: {})
    with tempfile.TemporaryDirectory(prefix="pipeline-plan-") as folder:
        run = _Played(folder, plan, jobs)
        events = EventLog(run.storage)
        try:
            progress, config = Progress(plan.stages, quiet=True), ExecutionConfig()
            Scheduler(plan, run, executor, events, progress, config, StopSignals()).execute()
        finally:
            events.close()
    return executor.played


class _Counted(Stage):
    """A stage that is only counted; its one group has its name."""

    def __init__(self, station: Station, names: Set[str]):
        self.name = station.name
        self.inputs = tuple(name for name in station.after if name in names)
        self.groups = (Group(station.name, {}),)
        self.max_workers = station.workers

    def process(self, task: Task) -> None:
        raise AssertionError("played, not run")


def _shards(jobs: Sequence[Job]) -> Iterator[Shard]:
    return (Shard(index, None, job.rows) for index, job in enumerate(jobs))


class _Played(RunFolder):
    """A run folder in which each job has what it does not need."""

    def __init__(self, folder: str, plan: Plan, jobs: Sequence[Job]):
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
