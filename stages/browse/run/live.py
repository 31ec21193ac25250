"""What the page of a run shows, in addition to what a `RunWatch` sees."""

import re
import shlex
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imagen_core.store import MANIFEST_NAME
from pipeline.engine.retries import REMOVED
from pipeline.engine.run_view import RunView
from pipeline.engine.watch import RunWatch
from pipeline.storage.run_folder import STORE, SUMMARY, RunFolder
from stages.browse.line_chart import LineChart, Series, line_chart
from stages.precompute.fetch import SAMPLES
from stages.store_tools.comparison import compare_with_plan
from stages.stores import group_bytes, open_store

_MOST_TRACEBACKS = 20
_MOST_BYTES = 20_000
_FAILED = re.compile(r"(.+)-(\d{5,})\.txt")
_MOST_REASONS = 3


@dataclass(frozen=True, slots=True)
class FailedShard:
    """A shard that failed in the latest run, after all tries.

    Attributes:
        traceback: its end, where it is long.
    """

    stage: str
    shard: str
    traceback: str


@dataclass(frozen=True, slots=True)
class FailedShards:
    """The first of the shards that failed, and how many there are."""

    first: tuple[FailedShard, ...]
    count: int


def failed_shards(run: RunFolder) -> FailedShards:
    """What `quarantine/failed` has."""
    found = sorted((name, match) for name in run.storage.names(run.failures) if (match := _FAILED.fullmatch(name)))
    first = []
    for name, match in found[:_MOST_TRACEBACKS]:
        path = f"{run.failures}/{name}"
        try:
            size = run.storage.size(path) or 0
            data = run.storage.read_part(path, max(0, size - _MOST_BYTES), _MOST_BYTES)
        except FileNotFoundError:  # a new run has begun
            continue
        cut = "[...]\n" if size > _MOST_BYTES else ""
        first.append(FailedShard(match[1], match[2], cut + data.decode("utf-8", "replace")))
    return FailedShards(tuple(first), len(found))


def throughput_chart(view: RunView) -> LineChart | None:
    """Rows per second of each stage, over the seconds of the latest run; None before its first task."""
    series = []
    for stage in view.stages:
        rates = view.throughput.get(stage.name, ())
        if rates:
            times, values = np.array(rates, np.float64).T
            series.append(Series(stage.name, times - (view.started or times[0]), values))
    return line_chart("rows per second", series, x_label="seconds of this run")


def retry_command(view: RunView, reasons: Sequence[str]) -> str:
    """The command that tries rows dropped for these reasons again; "" for none.

    Those of a group that is made from samples stay, as does what was removed.
    """
    usable = [reason for reason in reasons if reason != REMOVED]
    if not usable:
        return ""
    words = ["pipeline", "run", view.workflow, "--out", view.url, "--retry-dropped", ",".join(usable)]
    return shlex.join(words)


def all_retry_command(view: RunView) -> str:
    """The same for all drops of the input: its reasons if they are few, else `all`."""
    drops = next((group.drops for group in view.groups if group.name == SAMPLES), {})
    left = [reason for reason, count in drops.items() if reason != REMOVED and count > view.retried.get(reason, 0)]
    return retry_command(view, left if len(left) <= _MOST_REASONS else ["all"])


class AfterRun:
    """What is known once a run has ended: its summary, and what was planned against what it took. Safe for threads."""

    def __init__(self, watch: RunWatch):
        self._run = watch.run
        self._mutex = threading.Lock()
        self._seen: tuple[object, dict[str, Any] | None] | None = None

    def planned(self, view: RunView) -> dict[str, Any] | None:
        """See `compare_with_plan`; None while the run goes, or if no plan was saved. Computed once for each run.

        Raises:
            ConfigError: the plan or the store is damaged.
        """
        if view.is_running or self._run.storage.size(f"{STORE}/{MANIFEST_NAME}") is None:
            return None
        with self._mutex:
            key = view.started, view.last_event, view.state
            if self._seen is None or self._seen[0] != key:
                self._seen = key, compare_with_plan(self._run, group_bytes(open_store(self._run.store_url)))
            return self._seen[1]

    def summary(self, view: RunView) -> dict[str, Any] | None:
        """What the run wrote at its end; None while it goes.

        Raises:
            ConfigError: it is damaged.
        """
        return None if view.is_running else self._run.read_engine_file(SUMMARY)
