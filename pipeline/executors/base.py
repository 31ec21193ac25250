"""The executor interface: runs tasks somewhere and reports them back. It decides nothing else."""

import os
from abc import ABC, abstractmethod
from typing import Annotated

from pydantic import Field

from pipeline.config import Config
from pipeline.executors.task import TaskOutcome, TaskRequest
from pipeline.stage import Stage


class ExecutionConfig(Config):
    """How much runs at once. Changes nothing in the result."""

    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs to use on this machine; default all. Ignored when joining a cluster with --address."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Ray resources of the cluster that each task off the GPU asks for beside its CPUs, as `{cpu_node: 0.001}`: puts
    them on the nodes that have it. Ignored without --address."""
    idle_release_s: float = Field(default=300.0, gt=0)
    """A Ray worker that has had no task for so long is ended, and its GPU given back; made anew when needed."""
    max_in_flight_shards: int | None = Field(default=None, ge=1)
    """Shards admitted at once (backpressure); default twice the workers, at least 4."""
    max_attempts: int = Field(default=3, ge=1)
    """Tries of a failing shard before it is set aside with its traceback; deaths of its worker count apart, and the
    loss of a node does not count."""
    retry_delay_s: float = Field(default=5.0, ge=0)
    """Seconds before the second try; twice as many before each further one."""
    give_up_after_shards: int = Field(default=8, ge=1)
    """The run ends if a stage fails on so many shards and has not succeeded on any: the cause is not in the data."""
    grace_s: float = Field(default=10.0, ge=0)
    """Seconds that running tasks get to finish after Ctrl-C, SIGTERM or SIGHUP; a second signal ends them at once."""


class Executor(ABC):
    """Runs `run_task` on requests. Starts lazily: nothing is launched before the first `submit`."""

    window: int
    """Shards to keep in flight."""

    @abstractmethod
    def submit(self, stage: Stage, request: TaskRequest) -> None:
        """Queues a task."""

    @property
    @abstractmethod
    def num_tasks(self) -> int:
        """Tasks that were submitted and have not been returned by `wait`."""

    @abstractmethod
    def wait(self, timeout_s: float) -> list[TaskOutcome]:
        """Blocks until at least one task has finished or the time is over; returns those that have."""

    @abstractmethod
    def withdraw(self) -> None:
        """Forgets tasks that have not started yet, as far as it can tell."""

    @abstractmethod
    def close(self) -> None:
        """Stops all workers; running tasks are abandoned (they leave no partial output)."""


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
