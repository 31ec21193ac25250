"""The metrics of a training, read as they are written: only what is new is read again, and memory is bounded."""

import json
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.storage import Storage
from pipeline.storage.run_folder import METRICS

MOST_ROWS = 2**19
"""Steps that are kept; of more, the least and the greatest value of each metric in equal ranges of steps."""
MOST_METRICS = 64
_CHUNK_BYTES = 4 * 2**20
_TAIL_BYTES = 256


@dataclass(frozen=True, eq=False)
class Metrics:
    """What a training has logged so far; a call that finds nothing new gives the same object.

    Attributes:
        steps: int64 (n,), rising.
        values: float32 (n,) by name; NaN at steps without this metric.
        read: how much of the file was read, from 0 to 1.
        thinned: whether the file has more steps than are kept, so that some values stand at a neighbouring step.
        unreadable: lines that are damaged.
    """

    steps: np.ndarray
    values: Mapping[str, np.ndarray]
    read: float = 1.0
    thinned: bool = False
    unreadable: int = 0

    def curve(self, name: str, first: int | None = None, last: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric where it was logged, from step `first` to step `last`; empty if it never was.
        A value that is NaN in the file is as one that was not logged."""
        values = self.values.get(name)
        if values is None:
            return np.empty(0), np.empty(0)
        keep = ~np.isnan(values)
        keep &= self.steps >= (first or 0)
        if last is not None:
            keep &= self.steps <= last
        return self.steps[keep].astype(float), values[keep].astype(float)

    def last(self) -> dict[str, tuple[int, float]]:
        """Step and value of the newest value of each metric."""
        found = {name: np.flatnonzero(~np.isnan(values)) for name, values in self.values.items()}
        return {
            name: (int(self.steps[rows[-1]]), float(self.values[name][rows[-1]]))
            for name, rows in found.items()
            if len(rows)
        }


class MetricsFile:
    """Reads `metrics.jsonl` of one training. May be used from several threads.

    A training that resumes from a checkpoint logs the steps after it again: a line of an earlier step than the one
    before it therefore replaces all steps from it on.
    """

    def __init__(self, storage: Storage, most_rows: int = MOST_ROWS):
        self._storage, self._most_rows = storage, most_rows
        self._lock = threading.Lock()
        self._version: str | None = None
        self._start_over()

    def _start_over(self) -> None:
        self._offset, self._tail, self._read = 0, b"", 1.0
        self._rows = _Rows(self._most_rows)
        self._unreadable = 0
        self._found: Metrics | None = None

    def read(self, within_s: float = 1.0) -> Metrics:
        """The metrics, with what was added since the last call.

        Args:
            within_s: after this time what was not yet read is left to the next call.
        Raises:
            PipelineError, OSError: the file cannot be read; none at all is a training without metrics.
        """
        with self._lock:
            self._refresh(time.monotonic() + within_s)
            if self._found is None:
                self._found = self._rows.metrics(self._read, self._unreadable)
            return self._found

    def _refresh(self, until: float) -> None:
        version = self._storage.version(METRICS)
        if version == self._version and self._read == 1.0:
            return
        size = None if version is None else self._storage.size(METRICS)
        if size is None:
            self._start_over()
            self._version = None
            return
        self._found = None
        while True:
            back = len(self._tail)
            data = self._storage.read_part(METRICS, self._offset - back, back + _CHUNK_BYTES)
            if data[:back] != self._tail:  # the file was written again: a training that resumes removes lines
                self._start_over()
                continue
            self._take(data[back:])
            self._read = min(1.0, self._offset / size) if len(data) == back + _CHUNK_BYTES else 1.0
            if self._read == 1.0 or time.monotonic() >= until:
                self._version = version
                return

    def _take(self, data: bytes) -> None:
        """Takes the complete lines of new bytes."""
        end = data.rfind(b"\n") + 1
        if not end and len(data) == _CHUNK_BYTES:
            end = len(data)  # a line that long is damage
        if not end:
            return
        lines = data[:end].split(b"\n")
        parsed = [_parsed(line) for line in lines if line.strip()]
        with np.errstate(over="ignore"):
            self._rows.add(values for values in parsed if values is not None)
        self._unreadable += parsed.count(None)
        self._offset += end
        self._tail = (self._tail + data[:end])[-_TAIL_BYTES:]


@dataclass
class _Rows:
    """A growing table: a row per step, a column per metric."""

    most: int
    count: int = 0
    steps: np.ndarray = field(default_factory=lambda: np.empty(1024, np.int64))
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    thinned: bool = False

    def metrics(self, read: float, unreadable: int) -> Metrics:
        values = {name: column[: self.count].copy() for name, column in self.columns.items()}
        return Metrics(self.steps[: self.count].copy(), values, read, self.thinned, unreadable)

    def add(self, lines: Iterable[dict[str, float]]) -> None:
        for line in lines:
            step = int(line.pop("step"))
            newest = int(self.steps[self.count - 1]) if self.count else -1
            if step < newest:
                self.count = int(np.searchsorted(self.steps[: self.count], step))
            if step != newest:
                self._new_row(step)
            for name, value in line.items():
                column = self.columns.get(name)
                if column is None:
                    if len(self.columns) >= MOST_METRICS:
                        continue
                    column = self.columns[name] = np.full(len(self.steps), np.nan, np.float32)
                column[self.count - 1] = value

    def _new_row(self, step: int) -> None:
        if self.count >= self.most:
            self._thin()
        if self.count == len(self.steps):
            self.steps = np.concatenate([self.steps, np.empty_like(self.steps)])
            for name, column in self.columns.items():
                self.columns[name] = np.concatenate([column, np.full_like(column, np.nan)])
        self.steps[self.count] = step
        for column in self.columns.values():
            column[self.count] = np.nan
        self.count += 1

    def _thin(self) -> None:
        """Leaves two rows for each of so many equal ranges of steps: with the least and the greatest value of each
        metric, in their order. What is thin already stays."""
        steps = self.steps[: self.count]
        edges = np.linspace(steps[0], steps[-1], self.most // 4 + 1)[1:-1]
        starts = np.unique(np.concatenate([[0], np.searchsorted(steps, edges)]))
        ends = np.append(starts[1:], self.count)
        kept = np.unique(np.concatenate([starts, ends - 1]))
        first, last = np.searchsorted(kept, starts), np.searchsorted(kept, ends - 1)
        for column in self.columns.values():
            values = np.full(len(kept), np.nan, np.float32)
            earlier, later = _extremes(column[: self.count], starts, ends)
            values[last] = later
            values[first] = earlier
            column[: len(kept)] = values
        self.steps[: len(kept)] = steps[kept]
        self.count = len(kept)
        self.thinned = True


def _extremes(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest value of each range of rows, in the order in which they stand; NaN counts for
    nothing. Where both are the same value it is the first of the two, and the second is NaN."""
    places = np.arange(len(values))
    least, greatest = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
    at = [
        np.minimum.reduceat(np.where(values == np.repeat(each, ends - starts), places, len(values)), starts)
        for each in (least, greatest)
    ]
    forward = at[0] < at[1]
    later = np.where(at[0] == at[1], np.nan, np.where(forward, greatest, least))
    return np.where(forward, least, greatest), later


def _parsed(line: bytes) -> dict[str, float] | None:
    """The numbers of a line with a step; None for one that is damaged."""
    try:
        values: Any = json.loads(line)
        if not isinstance(values, dict) or not isinstance(step := values.get("step"), int) or not 0 <= step < 2**62:
            return None
        return {name: value if name == "step" else float(value) for name, value in values.items()}
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
