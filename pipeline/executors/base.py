"""The executor interface: runs tasks and returns their outcomes. The scheduler decides everything else."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config import Config
from pipeline.executors.task import TaskOutcome, TaskRequest
from pipeline.stage import Stage


class ExecutionConfig(Config):
    """Parallelism, retries and stopping. Changes nothing in the result."""

    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs to use on this machine; default all. Ignored when joining a cluster with --address."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom Ray resources that each task without a GPU requests in addition to its CPUs, as `{cpu_node: 0.001}`:
    places these tasks on the nodes that declare them. Ignored without --address."""
    idle_release_s: float = Field(default=300.0, gt=0)
    """A Ray worker without a task for this long is stopped and its GPU released; it starts again when needed."""
    max_in_flight_shards: int | None = Field(default=None, ge=1)
    """Shards admitted at once (backpressure); default twice the workers, at least 4."""
    max_attempts: int = Field(default=3, ge=1)
    """Tries of a failing shard before it is skipped and its traceback recorded; deaths of its worker are counted
    separately, and the loss of a node does not count."""
    task_limit_s: float | None = Field(default=7200.0, gt=0)
    """A worker whose tasks show no sign of progress (a row, a batch, a model loaded) for this long is ended, and its
    shards count one of their tries as with a worker that dies. null: never. The inline executor has no such limit."""
    retry_delay_s: float = Field(default=5.0, ge=0)
    """Seconds before the second try; doubled for each further try."""
    give_up_after_shards: int = Field(default=8, ge=1)
    """The run ends if a stage fails on this many shards without a success: the cause is not in the data."""
    disk_check: Literal["refuse", "warn"] = "refuse"
    """What to do if not even the least that a run can write fits on the disk: end before it begins (exit code 4), or
    warn, for file systems that compress or grow. What is expected and does not fit is always a warning."""
    grace_s: float = Field(default=10.0, ge=0)
    """Seconds in which running tasks may finish after Ctrl-C, SIGTERM or SIGHUP; a second signal ends them at once."""


class Executor(ABC):
    """Runs `run_task` on requests. Starts lazily: nothing is launched before the first `expect` or `submit`."""

    window: int
    """Shards to keep in flight."""

    def expect(self, stages: Sequence[Stage]) -> None:  # noqa: B027
        """Tells that a shard was admitted that will need these stages: their workers may start, import packages and
        load models while the first of the stages are at work."""

    @abstractmethod
    def submit(self, stage: Stage, request: TaskRequest) -> None:
        """Queues a task."""

    @property
    @abstractmethod
    def num_tasks(self) -> int:
        """Tasks that were submitted and have not been returned by `wait`."""

    @abstractmethod
    def wait(self, timeout_s: float) -> list[TaskOutcome]:
        """Blocks until at least one task has finished or the timeout has passed; returns the finished tasks."""

    @abstractmethod
    def withdraw(self) -> None:
        """Drops tasks that have not started yet, as far as this is known."""

    @abstractmethod
    def close(self) -> None:
        """Stops all workers; running tasks are abandoned (they leave no partial output)."""


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
