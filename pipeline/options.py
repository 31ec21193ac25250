"""What the command line gives a workflow beside its configuration."""

from dataclasses import dataclass

from pipeline.config import Config
from pipeline.executors.base import ExecutionConfig


class WorkflowConfig(Config):
    """What every workflow's configuration has."""

    execution: ExecutionConfig = ExecutionConfig()
    """How much runs at once."""


Summary = dict[str, object]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The command line's part of a run; none of it changes the result."""

    executor: str = "ray"
    address: str | None = None
    restart: bool = False
    retry_dropped: tuple[str, ...] = ()
    """Drop reasons to try again, or `all`."""
    quiet: bool = False
    take_over: bool = False
    """Take the folder from a run that is dead, without waiting for its lease to end."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What `pipeline plan` is to find out beside what is known without running anything."""

    probe: bool = False
    """Run the stages on some of the input's rows, here, to learn what they cost."""
    profile: str | None = None
    """Plan for this hardware instead of this machine: a shipped name or a YAML file."""
    rows: int | None = None
    """Plan for so many rows like those of the input."""
    executor: str | None = None
    """What the run would use; for the probe."""
    save: bool = False
    """Write the plan into the run folder, for the report."""
