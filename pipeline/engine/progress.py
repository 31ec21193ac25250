"""Shows the progress of a run: rich bars on a terminal, one plain line every 10 s elsewhere."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.executors.task import TaskOutcome
from pipeline.stage import Shard, Stage
from pipeline.storage.record import Record

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_PLAIN_INTERVAL_S = 10.0


@dataclass(slots=True)
class _StageCount:
    shards: int = 0
    rows: int = 0
    drops: int = 0
    seconds: float = 0.0


class Lines:
    """Progress of a job: one line that is rewritten on a terminal, one plain line every 10 s elsewhere."""

    def __init__(self, *, quiet: bool = False, started: float | None = None):
        """`started`: the `time.perf_counter` from which its seconds count; None means now."""
        now = time.perf_counter()
        self.quiet = quiet
        self.started = now if started is None else started
        self._next_line = now + _PLAIN_INTERVAL_S

    def message(self, text: str) -> None:
        """Shows a message that stays, on a line of its own."""
        if not self.quiet:
            print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    def show(self, text: str, *, final: bool = False) -> None:
        """Shows the state; `final` ends the line."""
        now = time.perf_counter()
        line = f"[{now - self.started:5.0f} s] {text}"
        if self.quiet:
            return
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="\n" if final else "", file=sys.stderr, flush=True)
        elif final or now >= self._next_line:
            self._next_line = now + _PLAIN_INTERVAL_S
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Removes the line that a terminal shows."""
        if not self.quiet and sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _drops_found(record: Record) -> int:
    """Rows that the stage itself found unusable; see `GroupResult.counters`."""
    counters = record.counters
    return sum(record.drops.values()) + int(counters.get("found_unusable", 0) - counters.get("found_before", 0))


class Progress:
    """Counts finished tasks by stage. Its size does not depend on the number of shards."""

    def __init__(self, stages: Sequence[Stage], total_shards: int | None = None, *, quiet: bool = False):
        self.counts = {stage.name: _StageCount() for stage in stages}
        self.total_shards = total_shards
        self.quiet = quiet
        self.started = time.perf_counter()
        self.skipped = 0
        self._next_line = self.started + _PLAIN_INTERVAL_S
        self._bars: RichProgress | None = None
        self._bar_ids: dict[str, TaskID] = {}

    def __enter__(self) -> "Progress":
        if not self.quiet and sys.stderr.isatty():
            self._open_bars()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _open_bars(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bars = RichProgress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards  {task.fields[rate]:>10}  {task.fields[drops]} drops  ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        for name in self.counts:
            self._bar_ids[name] = self._bars.add_task(name, total=self.total_shards, rate="", drops=0)
        self._bars.start()

    def admit(self, shard: Shard, needed: Sequence[Stage]) -> None:
        """A shard starts; stages it does not need count as finished."""
        for name in self.counts.keys() - {stage.name for stage in needed}:
            self._advance(name)

    def skip(self, shard: Shard) -> None:
        """A shard was complete already."""
        self.skipped += 1
        for name in self.counts:
            self._advance(name)

    def task_done(self, outcome: TaskOutcome) -> None:
        """A stage finished a shard."""
        count = self.counts[outcome.request.stage]
        count.shards += 1
        count.seconds += outcome.seconds
        count.rows += max((record.rows for record in outcome.records.values()), default=0)
        count.drops += max(map(_drops_found, outcome.records.values()), default=0)
        self._advance(outcome.request.stage)
        self._plain()

    def task_failed(self, outcome: TaskOutcome) -> None:
        """A shard failed after all tries."""
        self.message(f"{outcome.request.stage} {outcome.request.shard.name} failed: {outcome.error}")

    def message(self, text: str) -> None:
        """Shows a message."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False)
        elif not self.quiet:
            print(text, file=sys.stderr)

    def finish(self, shard: Shard) -> None:
        """A shard is complete."""
        self._plain()

    def rates(self) -> dict[str, dict[str, float]]:
        """For the summary: rows and busy seconds by stage (seconds add up over parallel workers)."""
        return {
            name: {"shards": count.shards, "rows": count.rows, "busy_s": round(count.seconds, 3)}
            for name, count in self.counts.items()
        }

    def _advance(self, name: str) -> None:
        if self._bars is None:
            return
        count, bar = self.counts[name], self._bar_ids[name]
        task = next(task for task in self._bars.tasks if task.id == bar)
        if task.total is not None and task.completed >= task.total:
            self._bars.update(bar, total=task.completed + 1)  # it was an estimate
        self._bars.update(bar, advance=1, rate=self._rate(count), drops=count.drops)

    def _of_total(self, done: int) -> str:
        """`3/8`; the total is an estimate, so it grows with what is done."""
        return f"{done}/{max(done, self.total_shards)}" if self.total_shards else str(done)

    def _rate(self, count: _StageCount) -> str:
        elapsed = time.perf_counter() - self.started
        return f"{count.rows / elapsed:,.0f} smp/s" if count.rows else ""

    def _plain(self) -> None:
        now = time.perf_counter()
        if self.quiet or self._bars is not None or now < self._next_line:
            return
        self._next_line = now + _PLAIN_INTERVAL_S
        parts = [
            f"{name} {self._of_total(count.shards + self.skipped)} shards {self._rate(count)}"
            + (f" {count.drops} drops" if count.drops else "")
            for name, count in self.counts.items()
        ]
        print(f"[{now - self.started:5.0f} s] " + "; ".join(parts), file=sys.stderr, flush=True)
