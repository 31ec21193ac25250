"""What a run looks like at one moment to `pipeline.engine.watch`: its stages, groups, drops, nodes and failures."""

from collections.abc import Mapping
from dataclasses import dataclass

RUNNING = "running"
READING = "reading its events"
INTERRUPTED = "interrupted"
"""The state of a run that was killed, or whose machine was lost: it has not said how it ended."""


@dataclass(frozen=True, slots=True)
class StageView:
    """A stage of a run.

    Attributes:
        done: finished shards, of all runs of the folder.
        rows: rows that it made in the latest run.
        rows_per_s: over the latest run; None before its first task.
        busy: workers that were busy in the last minute, on average; 0.0 if the run has ended.
        drops: rows that it dropped, of all runs.
        eta_s: None if unknown, or nothing is left.
    """

    name: str
    done: int
    total: int | None
    rows: int
    rows_per_s: float | None
    busy: float
    drops: int
    failed_tries: int
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class GroupView:
    """A lasting group: what its records say."""

    name: str
    stage: str
    shards: int
    rows: int
    drops: Mapping[str, int]
    """By reason, most first."""


@dataclass(frozen=True, slots=True)
class DropsView:
    """Drops that a stage found.

    Attributes:
        group: whose lists have them, which may be one of a later stage.
    """

    stage: str
    group: str
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class NodeView:
    """A machine of a cluster in the latest run; tasks, and seconds of its workers."""

    name: str
    tasks: int
    seconds: float
    last: float
    """Unix time of its last task's end."""


@dataclass(frozen=True, slots=True)
class FailedTry:
    """A task that failed; it may have succeeded in a later try."""

    time: float
    stage: str
    shard: int
    attempt: int
    lost: str
    error: str


@dataclass(frozen=True, slots=True)
class RunView:
    """A run at a moment.

    Attributes:
        state: `running`, `interrupted`, or how the latest run ended: `finished`, `failed`, `stopped: ...`; where none
            runs and the events are not all read yet, `reading its events`.
        is_behind: there are more events than this look has read.
        total_shards: an estimate of the run; None if there is none.
        started, last_event: Unix times of the latest run; None before it.
        throughput: by stage (Unix time of the start of an interval, rows per second in it).
        failures: the newest failed tries of the latest run, newest first.
        retried: rows that were dropped and that a later round tries again, by reason; they count in its shards.
    """

    url: str
    workflow: str
    executor: str
    state: str
    total_shards: int | None
    started: float | None
    last_event: float | None
    stages: tuple[StageView, ...]
    groups: tuple[GroupView, ...]
    drops: tuple[DropsView, ...]
    """By stage, group and reason: in the order of the groups and stages, most first."""
    throughput: Mapping[str, tuple[tuple[float, float], ...]]
    nodes: tuple[NodeView, ...]
    failures: tuple[FailedTry, ...]
    num_failed_tries: int
    retried: Mapping[str, int]
    is_behind: bool

    @property
    def is_running(self) -> bool:
        return self.state == RUNNING

    @property
    def eta_s(self) -> float | None:
        """Until the slowest stage has made what is left."""
        return max((stage.eta_s for stage in self.stages if stage.eta_s is not None), default=None)

    @property
    def num_drops(self) -> int:
        """Without those that a later round tries again."""
        return sum(sum(group.drops.values()) for group in self.groups) - sum(self.retried.values())
