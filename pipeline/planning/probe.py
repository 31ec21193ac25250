"""Measures the cost of the stages on this machine: runs them on a few input rows, in a temporary run folder."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import linear_regression

from pipeline.errors import PipelineError
from pipeline.executors.base import ExecutionConfig, Executor
from pipeline.executors.registry import make_executor
from pipeline.executors.task import TaskOutcome, TaskRequest
from pipeline.plan import Plan
from pipeline.stage import Shard, Stage
from pipeline.storage.run_folder import RunFolder
from pipeline.storage.scratch import temporary_folder

_FIRST_ROWS = 16
_BUDGET_S = 5.0
_POLL_S = 10.0


@dataclass(slots=True)
class LinearCost:
    """y = fixed + slope * x, neither negative."""

    fixed: float = 0.0
    slope: float = 0.0

    def at(self, x: float) -> float:
        return self.fixed + self.slope * x


@dataclass(slots=True)
class StageCost:
    """The cost of a stage that has the machine to itself."""

    start_s: float
    """Seconds once per worker: process start, packages, models."""
    seconds: LinearCost
    """Seconds of a shard, by its units."""
    unit: str
    """`rows`, or the counter of the stage's `Workload`."""
    cores: float
    """Number of CPUs that it keeps busy."""
    bytes: dict[str, LinearCost] = field(default_factory=dict)
    """Bytes of each group, by its rows."""


@dataclass(slots=True)
class Measured:
    """The measurements of a probe."""

    stages: dict[str, StageCost]
    run_start_s: float
    """Seconds to the first worker and after the last task: start and stop of Ray."""
    kept: float
    """Fraction of the input rows that become samples."""
    rows: int
    """Input rows that were run."""
    seconds: float
    """Duration of the probe."""


def probe(
    plan: Plan, stages: Sequence[Stage], samples: Sequence[Shard], kind: str, config: ExecutionConfig
) -> Measured:
    """Runs `stages` on rows of `samples`, one task at a time, in growing shards, for some seconds.

    Fetches these rows from the source (downloads them from a URL list). Writes a temporary folder only.

    Raises:
        PipelineError: a stage fails, or no row becomes a sample.
    """
    started = time.perf_counter()
    tasks: list[_Timed] = []
    with temporary_folder("pipeline-plan-") as folder:
        run = RunFolder(folder / "run", plan.transient_groups)
        executor = make_executor(kind, stages, run, config, None)
        try:
            spent = 0.0
            for shard in _growing(samples):
                done = _run_shard(plan, stages, run, executor, shard)
                tasks += done
                if shard.index:
                    spent += sum(timed.outcome.seconds - timed.outcome.setup_s for timed in done)
                if spent > _BUDGET_S:
                    break
        finally:
            closing = time.perf_counter()
            executor.close()
            closing = time.perf_counter() - closing
    kept, rows = _kept(plan, tasks)
    return Measured(
        stages={s.name: _cost(plan, s, [t for t in tasks if t.outcome.request.stage == s.name]) for s in stages},
        run_start_s=tasks[0].latency + closing,
        kept=kept,
        rows=rows,
        seconds=time.perf_counter() - started,
    )


@dataclass(slots=True)
class _Timed:
    outcome: TaskOutcome
    latency: float
    """Seconds from submission to the outcome, without the seconds of the task itself."""


def _growing(samples: Sequence[Shard]) -> Iterator[Shard]:
    """Shards of 16, 16, 32, 64 ... rows, taken from the sample shards in turn; none larger than a sample shard."""
    size, used = _FIRST_ROWS, [0] * len(samples)
    index = 0
    while any(start < sample.num_rows for start, sample in zip(used, samples, strict=True)):
        place = index % len(samples)
        sample, start = samples[place], used[place]
        rows = sample.rows[start : start + size]
        used[place] += len(rows)
        if rows:
            yield Shard(index, rows, len(rows), sample.files)
        index += 1
        size = size if index < 2 else 2 * size


def _run_shard(plan: Plan, stages: Sequence[Stage], run: RunFolder, executor: Executor, shard: Shard) -> list[_Timed]:
    present: set[str] = set()
    timed = []
    for stage in stages:
        wanted = frozenset(group.name for group in stage.groups)
        submitted = time.perf_counter()
        executor.submit(
            stage, TaskRequest(stage.name, shard, wanted, {n: plan.digests[n] for n in wanted}, frozenset(present))
        )
        outcomes: list[TaskOutcome] = []
        while not outcomes:
            outcomes = executor.wait(_POLL_S)
        outcome = outcomes[0]
        if outcome.error is not None:
            error = PipelineError(f"--probe: {stage.name} failed on sample rows of the input: {outcome.error}")
            error.exit_code = outcome.fatal_exit_code or error.exit_code
            raise error
        timed.append(_Timed(outcome, max(0.0, time.perf_counter() - submitted - outcome.seconds)))
        present |= wanted
    for group in plan.transient_groups:
        run.delete_shard(group, shard.name)
    return timed


def _kept(plan: Plan, tasks: Sequence[_Timed]) -> tuple[float, int]:
    records = [t.outcome.records[plan.row_group] for t in tasks if plan.row_group in t.outcome.records]
    rows, kept = sum(record.input_rows for record in records), sum(record.rows for record in records)
    if not kept:
        reasons = sorted({reason for record in records for reason in record.drops})
        raise PipelineError(
            f"--probe: all {rows} sample rows were dropped ({', '.join(reasons)}); "
            "check the source, or leave --probe out"
        )
    return kept / rows, rows


def _cost(plan: Plan, stage: Stage, tasks: Sequence[_Timed]) -> StageCost:
    """The first task includes the costs that occur once; it is ignored otherwise if there are others."""
    first = tasks[0]
    others = [t.outcome for t in tasks[1:]] or [first.outcome]
    unit = stage.workload([()])
    name = "rows" if unit is None else unit.counter
    seconds = [o.seconds - o.setup_s for o in others]
    return StageCost(
        start_s=first.outcome.setup_s + (first.latency if stage is not plan.stages[0] else 0.0),
        seconds=_fit([_units(o, name) for o in others], seconds),
        unit=name,
        cores=sum(o.cpu_s for o in others) / max(sum(seconds), 1e-9),
        bytes={
            group: _fit([o.records[group].rows for o in others], [o.records[group].bytes for o in others])
            for group in first.outcome.records
        },
    )


def _units(outcome: TaskOutcome, name: str) -> float:
    if name == "rows":
        return float(outcome.request.shard.num_rows)
    return sum(record.counters.get(name, 0) for record in outcome.records.values())


def _fit(x: Sequence[float], y: Sequence[float]) -> LinearCost:
    """Least squares; a line through the origin if the best line has a negative value somewhere."""
    if len(set(x)) > 1:
        slope, fixed = linear_regression(x, y)
        if slope > 0 and fixed >= 0:
            return LinearCost(fixed, slope)
    return LinearCost(0.0, sum(y) / sum(x) if any(x) else 0.0)
