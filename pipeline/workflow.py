"""Workflows: named compositions of stages, found through the `pipeline.workflows` entry points."""

from abc import ABC, abstractmethod
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, cast

from pipeline.config import Config
from pipeline.engine.runner import run_workflow
from pipeline.errors import ConfigError
from pipeline.options import PlanOptions, RunOptions, Summary
from pipeline.plan import Plan
from pipeline.planning.preview import preview
from pipeline.storage.run_folder import RunFolder


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
        """Runs, or resumes, the workflow in folder `out`; see `run_workflow` and `run_job`."""

    @abstractmethod
    def preview(self, out: str, options: PlanOptions | None = None) -> dict[str, object]:
        """What a run would do, as JSON; writes nothing unless `save` is set."""

    def next_steps(self, run: RunFolder) -> list[tuple[str, str]]:
        """Label and path, or command, of what to look at after a run."""
        return []


class ShardedWorkflow(Workflow):
    """Turns a configuration into a plan: stages over shards, each committed separately."""

    default_executor = "ray"

    @abstractmethod
    def plan(self, run: RunFolder) -> Plan:
        """Builds the plan; cheap, and opens the source far enough to refuse bad input.

        Raises:
            ConfigError: the input is missing or unusable.
        """

    def run(self, out: str, options: RunOptions) -> Summary:
        return run_workflow(self.name, self.config, self.plan, out, options)

    def preview(self, out: str, options: PlanOptions | None = None) -> dict[str, object]:
        return preview(self.name, self.config, self.plan, out, options or PlanOptions())


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


def _find(group: str, name: str, kind: str) -> EntryPoint:
    found = {entry.name: entry for entry in entry_points(group=group)}
    if name not in found:
        raise ConfigError(f"{kind} {name!r}: there is none of this name; choose from {', '.join(sorted(found))}")
    return found[name]
