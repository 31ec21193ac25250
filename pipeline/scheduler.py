"""Drives a plan: admits shards into a bounded window and runs each shard's stages as their inputs appear.

Different shards are in different stages at the same time, so shard 7 is encoded while shard 9 downloads.
Memory in the driver is bounded by the window, not by the number of shards.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.errors import PipelineError
from pipeline.events import EventLog
from pipeline.executors.base import Executor
from pipeline.plan import Plan
from pipeline.progress import Progress
from pipeline.retries import retried_rows
from pipeline.runfolder import QUARANTINE, Record, RunFolder
from pipeline.stage import Shard, Stage
from pipeline.state import Ledger
from pipeline.task import TaskOutcome, TaskRequest


@dataclass(slots=True)
class _Job:
    """One admitted shard."""

    shard: Shard
    needed: list[Stage]
    """Stages still to start."""
    present: set[str]
    """Groups committed so far."""
    running: int = 0
    failed: bool = False


@dataclass(slots=True)
class Tally:
    """Sums over all shards, from records; its size does not grow with the number of shards."""

    shards: int = 0
    shards_skipped: int = 0
    shards_failed: int = 0
    input_rows: int = 0
    groups: dict[str, "GroupTally"] = field(default_factory=dict)
    failures: list[dict[str, object]] = field(default_factory=list)
    """The first few failed tasks: shard, stage, error."""

    def add(self, record: Record) -> None:
        tally = self.groups.setdefault(str(record["group"]), GroupTally())
        tally.add(record)

    def leave_out(self, group: str, drops: Mapping[str, int]) -> None:
        """Takes back drops of rows that were tried again: they are counted where they were tried last."""
        self.input_rows -= sum(drops.values())
        counted = self.groups[group].drops if group in self.groups else {}
        for reason, count in drops.items():
            left = counted.pop(reason, 0) - count
            if left > 0:
                counted[reason] = left


@dataclass(slots=True)
class GroupTally:
    """Sums over the records of one group."""

    shards: int = 0
    rows: int = 0
    bytes: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        files, drops, counters = record["files"], record["drops"], record["counters"]
        assert isinstance(files, list)
        assert isinstance(drops, dict)
        assert isinstance(counters, dict)
        self.shards += 1
        self.rows += int(str(record["rows"]))
        self.bytes += sum(file["bytes"] for file in files)
        for reason, count in drops.items():
            self.drops[reason] = self.drops.get(reason, 0) + count
        for name, value in counters.items():
            merge = min if name.endswith("_min") else max if name.endswith("_max") else operator.add
            self.counters[name] = merge(self.counters[name], value) if name in self.counters else value


_MAX_LISTED_FAILURES = 20


class Scheduler:
    """Runs a plan to its end on an executor."""

    def __init__(
        self,
        plan: Plan,
        run: RunFolder,
        executor: Executor,
        events: EventLog,
        progress: Progress,
        *,
        max_attempts: int,
        restart: bool = False,
    ):
        self.plan = plan
        self.run = run
        self.executor = executor
        self.events = events
        self.progress = progress
        self.max_attempts = max_attempts
        self.ledger = Ledger(plan, run, restart=restart)
        self.retried_rows = retried_rows(run)
        self.tally = Tally()
        self.jobs: dict[int, _Job] = {}

    def execute(self) -> Tally:
        """Runs every shard that is not finished.

        A failing shard is retried, then set aside with its traceback; the others go on.

        Raises:
            PipelineError: no shard can succeed, the inputs changed, or another run has taken the folder over.
        """
        shards = self._unfinished()
        exhausted = False
        while True:
            while not exhausted and len(self.jobs) < self.executor.window:
                job = next(shards, None)
                if job is None:
                    exhausted = True
                    break
                self.jobs[job.shard.index] = job
                self._submit_ready(job)
            if not self.jobs:
                self.ledger.check_leftovers()
                order = list(self.plan.groups)
                self.tally.groups = dict(sorted(self.tally.groups.items(), key=lambda item: order.index(item[0])))
                return self.tally
            for outcome in self.executor.wait():
                self._handle(outcome)
            if self.run.lease is not None and self.run.lease.lost:
                self.run.lease.check()

    def _unfinished(self) -> Iterator[_Job]:
        """Streams the shards that still need work; counts those that do not."""
        for shard, finished in self.ledger.finished(self.plan.shards()):
            self.tally.shards += 1
            self.tally.input_rows += shard.num_rows
            needed = self.plan.needed(set(finished))
            for name, record in finished.items():
                if name not in self.plan.transient_groups:
                    self.tally.add(record)
            if needed:
                self.progress.admit(shard, needed)
                yield _Job(shard, needed, set(finished))
            else:
                self.tally.shards_skipped += 1
                self._drop_transient(shard)
                self.progress.skip(shard)

    def _submit_ready(self, job: _Job) -> None:
        for stage in [s for s in job.needed if job.present.issuperset(s.inputs)]:
            job.needed.remove(stage)
            job.running += 1
            self._submit(stage, job, attempt=1)

    def _submit(self, stage: Stage, job: _Job, attempt: int) -> None:
        wanted = frozenset(group.name for group in stage.groups if group.name not in job.present)
        fingerprints = {name: self.ledger.fingerprints[name] for name in wanted}
        retried = frozenset(self.retried_rows.get(job.shard.index, ()))
        request = TaskRequest(stage.name, job.shard, wanted, fingerprints, frozenset(job.present), retried, attempt)
        self.executor.submit(stage, request)

    def _handle(self, outcome: TaskOutcome) -> None:
        request = outcome.request
        job = self.jobs[request.shard.index]
        job.running -= 1
        if outcome.error is None:
            self._succeed(job, outcome)
        else:
            self._fail(job, outcome)
        if not job.running:
            self._drop_transient(job.shard)
            del self.jobs[job.shard.index]
            self.progress.finish(job.shard)

    def _succeed(self, job: _Job, outcome: TaskOutcome) -> None:
        request = outcome.request
        for name, record in outcome.records.items():
            job.present.add(name)
            if name not in self.plan.transient_groups:
                self.tally.add(record)
        self.events.write(
            "task",
            stage=request.stage,
            shard=request.shard.index,
            seconds=round(outcome.seconds, 4),
            setup_s=round(outcome.setup_s, 4),
            cpu_s=round(outcome.cpu_s, 4),
            groups={n: {"rows": r["rows"], "drops": r["drops"]} for n, r in outcome.records.items()},
        )
        self.progress.task_done(outcome)
        self._submit_ready(job)

    def _fail(self, job: _Job, outcome: TaskOutcome) -> None:
        request = outcome.request
        self.events.write(
            "task_failed",
            stage=request.stage,
            shard=request.shard.index,
            attempt=request.attempt,
            error=outcome.error,
        )
        if outcome.fatal_exit_code is not None:
            error = PipelineError(outcome.error)
            error.exit_code = outcome.fatal_exit_code
            raise error
        if request.attempt < self.max_attempts:
            stage = next(s for s in self.plan.stages if s.name == request.stage)
            job.running += 1
            self._submit(stage, job, request.attempt + 1)
            return
        self.tally.shards_failed += not job.failed
        job.failed = True
        job.needed.clear()
        where = f"{QUARANTINE}/failed/{request.stage}-{job.shard.name}.txt"
        self.run.storage.write_text(where, outcome.traceback or str(outcome.error))
        if len(self.tally.failures) < _MAX_LISTED_FAILURES:
            self.tally.failures.append(
                {
                    "stage": request.stage,
                    "shard": job.shard.index,
                    "error": outcome.error,
                    "traceback": where,
                }
            )
        self.progress.task_failed(outcome)

    def _drop_transient(self, shard: Shard) -> None:
        for group in self.plan.transient_groups - self.plan.keep:
            self.run.forget(group, shard.name)
