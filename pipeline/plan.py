"""A plan: the stages of a workflow as a graph over groups, and the stream of shards they run on."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from pipeline.fingerprint import digest
from pipeline.stage import Drop, Group, Shard, Stage
from pipeline.storage.record import Record
from pipeline.storage.run_folder import RunFolder

Show = Callable[[str], None]
"""Shows a line of progress in place of the one before."""


@dataclass(frozen=True)
class InputCounts:
    """The size of an input."""

    shards: int
    batches: int
    """How often new input was recorded."""
    passed_over: Mapping[str, Any] = field(default_factory=dict)
    """What was left out of it, for the summary and `finalize`."""


class Input(Protocol):
    """An input that may grow from one run to the next."""

    def shards(self) -> Iterator[Shard]:
        """The shards of earlier runs, unchanged, then the shards of new input.

        Raises:
            StaleOutputError: input of earlier runs is missing or has changed.
        """
        ...

    def begin_run(self) -> None:
        """Called before a run, which reads all of the input, and not before a plan."""
        ...

    def read_all(self) -> None:
        """Reads all of the input from now on, also what seems unchanged since an earlier run."""
        ...

    def has_new_input(self) -> bool:
        """True if there is input that no run has recorded yet."""
        ...

    def count(self) -> "InputCounts":
        """Counts the recorded input; where the files do not say how many rows they have, all are read."""
        ...

    def take(self, ranges: Sequence[range], counts: "InputCounts") -> None:
        """From now on `shards` gives only those with these indices, of the input that was counted; new input is left
        alone, and no row of other shards is read where the files say how many they have."""
        ...

    def record(self, *, restart: bool) -> None:
        """Records the new input, so that every later run makes the same shards of it.

        Args:
            restart: records input again that is missing or has changed, instead of refusing it.

        Raises:
            StaleOutputError: input of earlier runs is missing or has changed.
        """
        ...


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    stages: tuple[Stage, ...]
    """In topological order: every group is made before it is read."""
    shards: Callable[[], Iterator[Shard]]
    """Starts the stream of shards again; the input is never held in memory as a whole."""
    finalize: Callable[[RunFolder, int, Sequence[int], Show], dict[str, object]]
    """Called at the end, with the number of input rows, the indices of failed shards, and what shows how far it is;
    returns entries for the summary."""
    input: Input | None = None
    """The input behind `shards`, if it may grow."""
    final_file: str | None = None
    """The file that `finalize` writes, relative to the run folder; it is deleted before finished work is, so that it
    never lists missing files."""
    estimated_shards: int | None = None
    """Approximate number of shards, for the progress display; None if unknown."""
    row_group: str = ""
    """The group that decides which rows are samples; its drops are the dropped samples."""
    max_drop_fraction: float = 1.0
    keep: frozenset[str] = frozenset()
    """Transient groups whose files are kept."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """Folders of the run, by group, for groups that are no part of a store."""
    shard_size: int | None = None
    """Rows of a full shard; None means that the largest shard is a full one."""
    notices: tuple[str, ...] = ()
    """What the user should know of the result before the run; shown by the run, its summary and `pipeline plan`."""
    outlook: Callable[[Sequence[Shard], Mapping[str, float]], Mapping[str, Mapping[str, object]]] | None = None
    """What is known of the result before a run, from some shards spread over the input and the rows still to do of
    each group: by name an entry of the preview, whose `text` is shown."""
    lost_drops: Callable[[RunFolder, Shard, Record], Sequence[Drop]] | None = None
    """The dropped rows of a committed (group, shard) whose list is gone, from its files; None: it stays gone."""
    retry: Callable[[RunFolder, Sequence[str]], Counter[str]] | None = None
    """Has what other groups lack of samples tried again, where it is for one of these reasons or `all`; deletes the
    shards that are to be made again, and returns how many rows these are by reason."""
    captions: Callable[[Shard], Sequence[tuple[str, ...]]] | None = None
    """The captions of each row of a shard, for `Stage.workload`; reads no more of each row than needed."""
    further_captions: Callable[[Shard], Mapping[str, Sequence[tuple[str, ...]]]] | None = None
    """The captions of further sets, by the set's name, for `Stage.workload`."""
    no_parts: str = ""
    """Why several drivers cannot share the work, and the remedy; empty if they can."""
    check_group: Callable[[Group], None] | None = None
    """Raises ConfigError for a lasting group that `finalize` could not describe; so a run with such a stage of another
    package ends before it begins."""

    def __post_init__(self) -> None:
        made: set[str] = set()
        for stage in self.stages:
            missing = set(stage.inputs) - made
            assert not missing, f"stage {stage.name} reads {missing}, which no earlier stage makes"
            names = {group.name for group in stage.groups}
            assert not names & made, f"stage {stage.name} makes {names & made} a second time"
            made |= names
            for group in stage.groups:
                if self.check_group is not None and not group.transient:
                    self.check_group(group)

    @cached_property
    def groups(self) -> dict[str, Group]:
        return {group.name: group for stage in self.stages for group in stage.groups}

    @cached_property
    def transient_groups(self) -> frozenset[str]:
        return frozenset(name for name, group in self.groups.items() if group.transient)

    def needed(self, present: Set[str]) -> list[Stage]:
        """Stages to run on a shard with these groups: makers of missing lasting groups, and the stages before them."""
        needed: list[Stage] = []
        wanted_inputs: set[str] = set()
        for stage in reversed(self.stages):
            makes = {group.name for group in stage.groups}
            lasting = {group.name for group in stage.groups if not group.transient}
            if (lasting - present) or (makes & wanted_inputs) - present:
                needed.append(stage)
                wanted_inputs.update(stage.inputs)
        return needed[::-1]

    def dependencies(self) -> dict[str, tuple[str, ...]]:
        """For each group, the lasting groups that must be made before it; in topological order."""
        transient = self.transient_groups
        return {
            group.name: tuple(name for name in _made_from(stage, group) if name not in transient)
            for stage in self.stages
            for group in stage.groups
        }

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, object]]:
        """For each group, everything that its bytes depend on in addition to the rows of the shard."""
        result: dict[str, dict[str, object]] = {}
        for stage in self.stages:
            for group in stage.groups:
                inputs = {name: digest(result[name]) for name in _made_from(stage, group)}
                result[group.name] = {
                    "stage": stage.identity,
                    "version": stage.version,
                    "config": dict(group.config),
                    "inputs": inputs,
                }
        return result

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digest of each group's fingerprint."""
        return {name: digest(fingerprint) for name, fingerprint in self.fingerprints.items()}

    def describe(self, workflow: str) -> dict[str, object]:
        """The plan as JSON: stages, groups and what they depend on."""
        return {
            "workflow": workflow,
            "stages": [
                {
                    "name": stage.name,
                    "inputs": list(stage.inputs),
                    "groups": [group.name for group in stage.groups],
                    "num_cpus": stage.resources.num_cpus,
                    "num_gpus": stage.resources.num_gpus,
                    "max_workers": stage.max_workers,
                }
                for stage in self.stages
            ],
            "transient_groups": sorted(self.transient_groups),
            "fingerprints": self.fingerprints,
            "max_drop_fraction": self.max_drop_fraction,
        }


def _made_from(stage: Stage, group: Group) -> tuple[str, ...]:
    """The groups that a group is made from or aligned with."""
    return (*(stage.inputs if group.inputs is None else group.inputs), *group.aligned_with)
