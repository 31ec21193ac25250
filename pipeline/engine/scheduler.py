"""Drives a plan: admits shards into a bounded window and runs each shard's stages as their inputs appear.

Different shards are in different stages at the same time, so shard 7 is encoded while shard 9 downloads.
Memory in the driver is bounded by the window, not by the number of shards.
"""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from pipeline.engine.progress import Progress
from pipeline.engine.state import RunState
from pipeline.engine.tally import Tally
from pipeline.errors import PipelineError
from pipeline.executors.base import ExecutionConfig, Executor
from pipeline.executors.task import TaskOutcome, TaskRequest
from pipeline.signals import StopSignals
from pipeline.stage import Shard, Stage
from pipeline.storage import BackgroundTasks
from pipeline.storage.events import EventLog
from pipeline.storage.record import Record


@dataclass(slots=True)
class _AdmittedShard:
    """One admitted shard."""

    shard: Shard
    needed: list[Stage]
    """Stages still to start."""
    present: dict[str, Record]
    """Groups committed so far, with their records."""
    running: int = 0
    """Tasks submitted, or waiting for their next try."""
    failed: bool = False
    losses: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By stage and kind: how often the worker or the node was lost."""


_MAX_LISTED_FAILURES = 20
_POLL_S = 1.0
_USED_AT_ONCE = 32
_MAX_NODE_LOSSES = 20  # of one task; after that the task itself is assumed to crash nodes


class Scheduler:
    """Runs a plan on an executor until every shard is finished or has failed."""

    def __init__(
        self,
        state: RunState,
        executor: Executor,
        events: EventLog,
        progress: Progress,
        config: ExecutionConfig,
        stop: StopSignals,
    ):
        self.plan = state.plan
        self.run = state.run
        self.ledger = state.ledger
        self.retried_rows = state.retries.rows
        self.executor = executor
        self.events = events
        self.progress = progress
        self.config = config
        self.stop = stop
        self.background = BackgroundTasks(self.run.storage)
        self.tally = Tally()
        self.admitted: dict[int, _AdmittedShard] = {}
        self.later: list[tuple[float, Stage, _AdmittedShard, int]] = []
        """Further tries: time (monotonic clock), stage, shard, attempt."""
        self.failed_shards: list[int] = []
        self.used: list[str] = []
        """Shards whose intermediate files are to be deleted."""
        self.failures: Counter[str] = Counter()
        """Stage -> shards it failed on."""
        self.succeeded: set[str] = set()

    def execute(self) -> Tally:
        """Runs every shard that is not finished.

        A failing shard is retried, then skipped and its traceback recorded; the others continue. After a stop signal
        running tasks finish and no other task starts.

        Raises:
            PipelineError: no shard can succeed, the inputs changed, or another run has taken the folder over.
            KeyboardInterrupt, PreemptedError: stopped by a signal.
        """
        shards = self._unfinished()
        exhausted = False
        while self.admitted or not exhausted:
            if self.stop.received:
                self._finish_running(self.stop.received)
            while not exhausted and not self.stop.received and len(self.admitted) < self.executor.window:
                job = next(shards, None)
                if job is None:
                    exhausted = True
                    break
                self.admitted[job.shard.index] = job
                self.executor.expect(job.needed)
                self._submit_ready(job)
            self._submit_due()
            if self.admitted:
                self._wait()
        self._drop_used()
        self.background.finish()
        self.ledger.check_leftovers()
        order = list(self.plan.groups)
        self.tally.groups = dict(sorted(self.tally.groups.items(), key=lambda item: order.index(item[0])))
        return self.tally

    def _finish_running(self, signal_number: int) -> NoReturn:
        self.executor.withdraw()
        self.progress.message(
            f"{signal.Signals(signal_number).name}: finishing {self.executor.num_tasks} running tasks, "
            f"for at most {self.config.grace_s:g} s; send it again to stop at once"
        )
        while self.executor.num_tasks:
            self._wait()
        self.stop.raise_stop()

    def _wait(self) -> None:
        """Handles finished tasks; returns soon, so that signals and further tries are handled too."""
        now = time.monotonic()
        timeout_s = min([_POLL_S, *(max(0.0, due - now) for due, *_ in self.later)])
        if not self.executor.num_tasks:
            time.sleep(timeout_s)
            return
        for outcome in self.executor.wait(timeout_s):
            self._handle(outcome)
        self.run.check_step()

    def _unfinished(self) -> Iterator[_AdmittedShard]:
        """Streams the shards that still need work; counts the finished ones."""
        for shard, finished in self.ledger.finished(self.plan.shards()):
            self.tally.shards += 1
            self.tally.input_rows += shard.num_rows
            needed = self.plan.needed(set(finished))
            self.succeeded.update(s.name for s in self.plan.stages if s not in needed)
            for name, record in finished.items():
                if name not in self.plan.transient_groups:
                    self.tally.add(record)
            if needed:
                shard.pack()
                self.progress.admit(shard, needed)
                yield _AdmittedShard(shard, needed, dict(finished))
            else:
                self.tally.shards_skipped += 1
                self._drop_transient(shard)
                self.progress.skip(shard)

    def _submit_ready(self, job: _AdmittedShard) -> None:
        if self.stop.received:
            return
        for stage in [s for s in job.needed if job.present.keys() >= set(s.inputs)]:
            job.needed.remove(stage)
            job.running += 1
            self._submit(stage, job, attempt=1)

    def _submit_due(self) -> None:
        now = time.monotonic()
        due = [entry for entry in self.later if entry[0] <= now]
        self.later = [entry for entry in self.later if entry[0] > now]
        for _, stage, job, attempt in due:
            self._submit(stage, job, attempt)

    def _submit(self, stage: Stage, job: _AdmittedShard, attempt: int) -> None:
        wanted = frozenset(group.name for group in stage.groups if group.name not in job.present)
        fingerprints = {name: self.plan.digests[name] for name in wanted}
        retried = frozenset(self.retried_rows.get(job.shard.index, ()))
        alone = job.losses[stage.name, "worker"] > 0
        request = TaskRequest(
            stage=stage.name,
            shard=job.shard,
            wanted=wanted,
            fingerprints=fingerprints,
            present=frozenset(job.present),
            records=dict(job.present),
            listed_drops=self.ledger.listed_drops(job.shard, wanted) if attempt == 1 and not job.losses else None,
            retried_rows=retried,
            attempt=attempt,
            alone=alone,
            limit_s=self.config.task_limit_s,
        )
        self.executor.submit(stage, request)

    def _handle(self, outcome: TaskOutcome) -> None:
        request = outcome.request
        job = self.admitted[request.shard.index]
        job.running -= 1
        if outcome.error is None:
            self._succeed(job, outcome)
        else:
            self._fail(job, outcome)
        if not job.running and not self.stop.received:
            self._drop_transient(job.shard)
            del self.admitted[job.shard.index]
            self.progress.finish(job.shard)

    def _succeed(self, job: _AdmittedShard, outcome: TaskOutcome) -> None:
        request = outcome.request
        self.succeeded.add(request.stage)
        for name, record in outcome.records.items():
            job.present[name] = record
            self.run.note(record)
            if name not in self.plan.transient_groups:
                self.tally.add(record)
        self.events.write(
            "task",
            stage=request.stage,
            shard=request.shard.index,
            seconds=round(outcome.seconds, 4),
            setup_s=round(outcome.setup_s, 4),
            cpu_s=round(outcome.cpu_s, 4),
            **({"node": outcome.node} if outcome.node else {}),
            groups={name: _described(record) for name, record in outcome.records.items()},
        )
        self.progress.task_done(outcome)
        self._submit_ready(job)
        if self.run.index is not None:
            self.run.index.save_if_due()

    def _fail(self, job: _AdmittedShard, outcome: TaskOutcome) -> None:
        request = outcome.request
        self.events.write(
            "task_failed",
            stage=request.stage,
            shard=request.shard.index,
            attempt=request.attempt,
            **({"lost": outcome.lost} if outcome.lost else {}),
            error=outcome.error,
        )
        if outcome.fatal_exit_code is not None:
            error = PipelineError(outcome.error)
            error.exit_code = outcome.fatal_exit_code
            raise error
        if self._may_retry(job, outcome):
            stage = next(s for s in self.plan.stages if s.name == request.stage)
            delay_s = 0.0 if outcome.lost == "node" else self.config.retry_delay_s * 2 ** (request.attempt - 1)
            due = time.monotonic() + delay_s
            job.running += 1
            self.later.append((due, stage, job, request.attempt + (not outcome.lost)))
            return
        if not job.failed:
            self.failed_shards.append(job.shard.index)
            self.tally.shards_failed += 1
        job.failed = True
        job.needed.clear()
        where = f"{self.run.failures}/{request.stage}-{job.shard.name}.txt"
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
        self.failures[request.stage] += 1
        if request.stage not in self.succeeded and self.failures[request.stage] >= self.config.give_up_after_shards:
            raise PipelineError(
                f"{request.stage} failed on each of its first {self.failures[request.stage]} shards "
                f"(execution.give_up_after_shards), so the others are not tried. Last: {outcome.error}\n"
                f"Tracebacks: {self.run.url}/{self.run.failures}. Fix the cause and run the same command again."
            )

    def _may_retry(self, job: _AdmittedShard, outcome: TaskOutcome) -> bool:
        """Whether to try again. Errors and lost workers each have `max_attempts`."""
        if not outcome.lost:
            return outcome.request.attempt < self.config.max_attempts
        loss = (outcome.request.stage, outcome.lost)
        job.losses[loss] += 1
        return job.losses[loss] < (self.config.max_attempts if outcome.lost == "worker" else _MAX_NODE_LOSSES)

    def _drop_transient(self, shard: Shard) -> None:
        """Deletes the intermediate files of a shard, on an object store those of some shards together."""
        self.used.append(shard.name)
        if self.run.index is None or len(self.used) >= _USED_AT_ONCE:
            self._drop_used()

    def _drop_used(self) -> None:
        for group in self.plan.transient_groups - self.plan.keep:
            self.background.do(self.run.delete_shards, group, self.used)
        self.used = []


def _described(record: Record) -> dict[str, object]:
    """What the event of a task says of a group."""
    before = record.info.get("found_before")
    return {"rows": record.rows, "drops": dict(record.drops), **({"found_before": before} if before else {})}
