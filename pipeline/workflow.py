"""Workflows: named compositions of stages, found through the `pipeline.workflows` entry points."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, cast

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.executors.base import ExecutionConfig
from pipeline.plan import Plan
from pipeline.runfolder import RunFolder


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


class Workflow(ABC):
    """What `pipeline run NAME` does with a configuration. Derive from `ShardedWorkflow` or `JobWorkflow`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    config_class: ClassVar[type[Config]]
    default_executor: ClassVar[str]

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def run(self, out: str, options: RunOptions) -> Summary:
        """Runs, or goes on with, the workflow in folder `out`; see `run_workflow` and `run_job`."""

    @abstractmethod
    def preview(self, out: str, options: PlanOptions = PlanOptions()) -> dict[str, object]:
        """What a run would do, as JSON; writes nothing unless asked to `save`."""

    def closing_words(self, run: RunFolder) -> list[tuple[str, str]]:
        """Label and path of what the user should look at after a run."""
        return []


class ShardedWorkflow(Workflow):
    """Turns a configuration into a plan: stages over shards, each committed on its own."""

    default_executor = "ray"

    @abstractmethod
    def plan(self, run: RunFolder) -> Plan:
        """Builds the plan; cheap, and opens the source far enough to refuse bad input.

        Raises:
            ConfigError: the input is missing or unusable.
        """

    def run(self, out: str, options: RunOptions) -> Summary:
        from pipeline.runner import run_workflow

        return run_workflow(self, out, options)

    def preview(self, out: str, options: PlanOptions = PlanOptions()) -> dict[str, object]:
        from pipeline.preview import preview

        return preview(self, out, options)


_WORKFLOWS = "pipeline.workflows"
_COMMANDS = "pipeline.commands"


def load_workflow(name: str) -> type[Workflow]:
    """Finds a workflow by name.

    Raises:
        ConfigError: no such workflow; lists those there are.
    """
    return cast(type[Workflow], _find(_WORKFLOWS, name, "workflow").load())


def load_command(name: str) -> Any:
    """Finds the function behind a reading command (verify, inspect, report)."""
    return _find(_COMMANDS, name, "command").load()


def workflow_names() -> list[str]:
    """Names of all installed workflows."""
    return sorted(entry.name for entry in entry_points(group=_WORKFLOWS))


def _find(group: str, name: str, kind: str) -> EntryPoint:
    found = {entry.name: entry for entry in entry_points(group=group)}
    if name not in found:
        raise ConfigError(f"{kind} {name!r}: there is none of this name; choose from {', '.join(sorted(found))}")
    return found[name]
