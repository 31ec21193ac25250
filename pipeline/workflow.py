"""Workflows: named compositions of stages, found through the `pipeline.workflows` entry points."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, cast

from pipeline.config import Config
from pipeline.engine.parts import finish_run, run_part
from pipeline.engine.runner import run_workflow
from pipeline.errors import ConfigError
from pipeline.executors.local_worker import warmed
from pipeline.options import PlanOptions, RunOptions, Summary
from pipeline.plan import Plan
from pipeline.planning.preview import preview
from pipeline.resources import Resources
from pipeline.storage.out_folder import check_out
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

    def resources(self) -> Resources:
        """The CPUs and GPUs that a run can make use of, as far as its configuration says; a scheduler is asked for
        them."""
        return Resources(num_cpus=4.0, num_gpus=0.0 if getattr(self.config, "device", "auto") == "cpu" else 1.0)

    def next_steps(self, run: RunFolder) -> list[tuple[str, str]]:
        """Label and path, or command, of what to look at after a run."""
        return []


class ShardedWorkflow(Workflow):
    """Turns a configuration into a plan: stages over shards, each committed separately."""

    default_executor = "ray"
    has_parts: ClassVar[bool] = False
    """Whether several drivers can share the work: its plan has an `input`."""

    @abstractmethod
    def plan(self, run: RunFolder) -> Plan:
        """Builds the plan; cheap, and opens the source far enough to refuse bad input.

        Raises:
            ConfigError: the input is missing or unusable.
        """

    def modules(self) -> Sequence[str]:
        """Large modules that the plan and its stages import: see `Stage.modules`. Local runs begin to import them
        before they plan."""
        return ()

    def run(self, out: str, options: RunOptions) -> Summary:
        check_out(RunFolder(out), self.name, self.config.model_dump(mode="json"))
        if options.part is not None and not self.has_parts:
            raise ConfigError(f"--part {options.part}: {self.name} has no parts; leave it out")
        with warmed(self.modules() if options.executor == "local" else ()):
            if options.part is not None:
                return run_part(self.name, self.config, self.plan, out, options, options.part)
            return run_workflow(self.name, self.config, self.plan, out, options)

    def finish(self, out: str, options: RunOptions) -> Summary:
        """Puts together what drivers of parts have made; see `finish_run`."""
        return finish_run(self.name, self.config, self.plan, out, options)

    def preview(self, out: str, options: PlanOptions | None = None) -> dict[str, object]:
        check_out(RunFolder(out), self.name, self.config.model_dump(mode="json"))
        return preview(self.name, self.config, self.plan, out, options or PlanOptions())


_WORKFLOWS = "pipeline.workflows"
_COMMANDS = "pipeline.commands"
_IMPORTS = "pipeline.imports"


def load_workflow(name: str) -> type[Workflow]:
    """Finds a workflow by name.

    Raises:
        ConfigError: no such workflow, which lists the available ones; or its package is broken.
    """
    return cast(type[Workflow], _load(_WORKFLOWS, name, "workflow"))


def load_command(name: str) -> Any:
    """Finds the function behind a command that a stage offers (verify, inspect, report)."""
    return _load(_COMMANDS, name, "command")


def load_import(kind: str) -> Any:
    """Finds the function that makes checkpoints of another system's models; ConfigError as of `load_workflow`."""
    return _load(_IMPORTS, kind, "import")


def _load(group: str, name: str, what: str) -> Any:
    """What an entry point names.

    Raises:
        ConfigError: there is none of this name, two packages have one, or it cannot be loaded; with the remedy.
    """
    found = entry_points(group=group)
    named = list(found.select(name=name))
    if not named:
        choices = ", ".join(sorted(found.names))
        raise ConfigError(f"{what} {name!r}: there is none of this name; choose from {choices}")
    owners = " and by ".join(_described(entry) for entry in named)
    if len(named) > 1:
        raise ConfigError(f"{what} {name!r} is defined by {owners}; uninstall one of the packages")
    try:
        return named[0].load()
    except Exception as error:
        raise ConfigError(
            f"{what} {name!r} of {owners} cannot be loaded ({type(error).__name__}: {error}); "
            "repair or uninstall the package"
        ) from error


def _described(entry: EntryPoint) -> str:
    package = "an unknown package" if entry.dist is None else f"package {entry.dist.name} {entry.dist.version}"
    return f"{package} (entry point `{entry.name} = {entry.value}` in {entry.group})"
