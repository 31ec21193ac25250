"""The options of the command line that a workflow receives in addition to its configuration."""

import re
from dataclasses import dataclass
from typing import Self

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.executors.base import ExecutionConfig
from pipeline.executors.ray_address import meant_address
from pipeline.storage.credentials import check_no_credentials


class WorkflowConfig(Config):
    """The keys that the configurations of all workflows share."""

    execution: ExecutionConfig = ExecutionConfig()
    """Parallelism, retries and stopping."""


Summary = dict[str, object]


@dataclass(frozen=True, slots=True)
class Part:
    """One of several equal parts of a run, each with a driver of its own."""

    number: int
    """From 1."""
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The part in a text such as `3/100`.

        Raises:
            ConfigError: it is none.
        """
        found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text.strip())
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"--part {text}: give K/N, with K from 1 to N, such as 3/100")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of `pipeline run`; none of them changes the result."""

    executor: str = "ray"
    address: str | None = None
    restart: bool = False
    retry_dropped: tuple[str, ...] = ()
    """Drop reasons to try again, or `all`."""
    quiet: bool = False
    take_over: bool = False
    """Take over the folder of a dead run, without waiting for its lease to expire."""
    check_input: bool = False
    """Read all of the input, also files with the size and time that an earlier start noted."""
    part: Part | None = None
    """Do this part of the work; drivers of the others may work in the same folder at the same time."""

    def __post_init__(self) -> None:
        check_no_credentials(self.address or "", "--address")

    @property
    def cluster(self) -> str | None:
        """Address of the Ray cluster that the run joins (see `meant_address`); None if it starts one or needs none."""
        return meant_address(self.address) if self.executor == "ray" else self.address


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of `pipeline plan`."""

    probe: bool = False
    """Run the stages on some rows of the input, on this machine, to measure their cost."""
    profile: str | None = None
    """Plan for this hardware instead of this machine: a shipped name or a YAML file."""
    rows: int | None = None
    """Plan for this number of rows like the rows of the input."""
    executor: str | None = None
    """The executor that the run would use; for the probe."""
    save: bool = False
    """Write the plan into the run folder, for the report."""
    check_input: bool = False
    """As of `RunOptions`."""
