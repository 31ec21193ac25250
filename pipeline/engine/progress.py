"""Shows the progress of a run: a line per stage on a terminal, one plain line every 10 s elsewhere."""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.engine.lines import StageLine, duration, fitting, stage_lines
from pipeline.executors.task import TaskOutcome
from pipeline.stage import Shard, Stage
from pipeline.storage.record import Record

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_PLAIN_INTERVAL_S = 10.0


@dataclass(slots=True)
class _StageCount:
    shards: int = 0
    rows: int = 0
    drops: int = 0
    seconds: float = 0.0
    unneeded: int = 0
    """Shards that were admitted without it: it had finished them before."""


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
            first, *others = text.split("  ")
            width = shutil.get_terminal_size().columns - 1  # a line that is wrapped would stay
            line = fitting([f"[{now - self.started:5.0f} s] {first}", *others], width)
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
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if not self.quiet and sys.stderr.isatty():
            self._open_lines()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _open_lines(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        console = Console(stderr=True)

        def render() -> "RenderableType":
            return Text("\n".join(stage_lines(self.lines(), console.width)), no_wrap=True, overflow="crop")

        self._live = Live(console=console, get_renderable=render, refresh_per_second=4)
        self._live.start()

    def lines(self) -> list[StageLine]:
        """The stages as they are shown."""
        elapsed = time.perf_counter() - self.started
        return [self._stage_line(name, count, elapsed) for name, count in self.counts.items()]

    def _stage_line(self, name: str, count: _StageCount, elapsed: float) -> StageLine:
        done, total = count.shards + count.unneeded + self.skipped, self.total_shards
        left = max(0, total - done) if total else 0
        return StageLine(
            name,
            done,
            total,
            count.rows / elapsed if count.rows else None,
            count.drops,
            left * elapsed / count.shards if left and count.shards else None,
        )

    def admit(self, shard: Shard, needed: Sequence[Stage]) -> None:
        """A shard starts; stages it does not need count as finished."""
        for name in self.counts.keys() - {stage.name for stage in needed}:
            self.counts[name].unneeded += 1

    def skip(self, shard: Shard) -> None:
        """A shard was complete already."""
        self.skipped += 1

    def task_done(self, outcome: TaskOutcome) -> None:
        """A stage finished a shard."""
        count = self.counts[outcome.request.stage]
        count.shards += 1
        count.seconds += outcome.seconds
        count.rows += max((record.rows for record in outcome.records.values()), default=0)
        count.drops += max(map(_drops_found, outcome.records.values()), default=0)
        self._plain()

    def task_failed(self, outcome: TaskOutcome) -> None:
        """A shard failed after all tries."""
        self.message(f"{outcome.request.stage} {outcome.request.shard.name} failed: {outcome.error}")

    def message(self, text: str) -> None:
        """Shows a message."""
        if self._live is not None:
            self._live.console.print(text, markup=False)
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

    def _plain(self) -> None:
        now = time.perf_counter()
        if self.quiet or self._live is not None or now < self._next_line:
            return
        self._next_line = now + _PLAIN_INTERVAL_S
        print(
            f"[{now - self.started:5.0f} s] " + "; ".join(map(_plain_line, self.lines())), file=sys.stderr, flush=True
        )


def _plain_line(line: StageLine) -> str:
    """`resize 3/8 shards 120 rows/s 2 drops ETA 0:05`; the total is an estimate, so it grows with what is done."""
    shards = f"{line.done}/{max(line.done, line.total)}" if line.total else str(line.done)
    rate = "" if line.rows_per_s is None else f" {line.rows_per_s:,.0f} rows/s"
    drops = f" {line.drops} drops" if line.drops else ""
    return f"{line.name} {shards} shards{rate}{drops}" + ("" if line.eta_s is None else f" ETA {duration(line.eta_s)}")
