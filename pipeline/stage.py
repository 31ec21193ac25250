"""What a step of the pipeline is: a `Stage` turns one `Shard` into files of one or more `Group`s.

A group is a column of the result (`samples`, `images-64`, `text-t5`): one or more files per shard. Each
(group, shard) is committed separately, so a group added later leaves the others untouched.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pipeline.resources import CaptionsBySet, Resources, RowsOfCaptions, Workload
from pipeline.shard import Shard
from pipeline.storage.record import Record
from pipeline.storage.run_folder import RunFolder

_last_sign = time.monotonic()


def note_progress() -> None:
    """Tells that this worker gets on; without such a sign for `execution.task_limit_s` it is ended. A stage tells it
    after every row, batch or the like; it costs nothing."""
    global _last_sign
    _last_sign = time.monotonic()


def seconds_without_progress() -> float:
    """Seconds since the last sign of progress in this process."""
    return time.monotonic() - _last_sign


@dataclass(frozen=True, slots=True)
class Group:
    """A column of the result, made shard by shard."""

    name: str
    config: Mapping[str, object]
    """Everything that its bytes depend on in addition to the input rows; a change is refused with a diff."""
    transient: bool = False
    """True for intermediate files, deleted once no stage of the shard needs them."""
    aligned_with: tuple[str, ...] = ()
    """Groups of the same stage that decide its rows: if they are made again, so is this one."""
    shared_files: tuple[str, ...] = ()
    """Files of the group that belong to no shard; `setup` writes the missing ones."""
    inputs: tuple[str, ...] | None = None
    """Those of the stage's inputs that its bytes depend on; None means all."""
    cells: str | None = None
    """The further column of the input that its bytes depend on instead of the rows; see `Shard.cells`."""


@dataclass(frozen=True, slots=True)
class Drop:
    """A dropped sample, and the reason."""

    row: int
    key: str
    reason: str
    """A short enumerated word such as `http_404`; counted, so it must not contain values."""
    detail: str = ""


def rows_by_reason(drops: Iterable[Drop]) -> dict[str, list[int]]:
    """The dropped rows of each reason, reasons sorted."""
    result: dict[str, list[int]] = {}
    for drop in sorted(drops, key=lambda drop: (drop.reason, drop.row)):
        result.setdefault(drop.reason, []).append(drop.row)
    return result


@dataclass(slots=True)
class GroupResult:
    """What a stage reports about one group of one shard once it has written its files."""

    rows: int
    drops: list[Drop] = field(default_factory=list)
    counters: Mapping[str, float] = field(default_factory=dict)
    """Further numbers, summed over shards in the summary (`tokens`, `captions_truncated`, ...); of those that end in
    `_min` or `_max` the minimum or maximum is kept. Progress shows a drop at the stage that found it: `found_unusable`
    counts rows that a later stage lists as drops, `found_before` drops that an earlier stage found."""
    info: Mapping[str, object] = field(default_factory=dict)
    """Further entries of the record (`excluded_rows` by reason, ...); `found_before`: of the drops, those that an
    earlier stage found, by reason."""


class Task:
    """One shard as a stage sees it: paths to read, paths to write, and which groups are wanted.

    A stage writes only to `output`, and calls `done` for every wanted group.
    """

    def __init__(
        self,
        run: RunFolder,
        shard: Shard,
        wanted: frozenset[str],
        present: frozenset[str] = frozenset(),
        retried_rows: frozenset[int] = frozenset(),
        records: Mapping[str, Record] | None = None,
    ):
        self.run = run
        self.shard = shard
        self.wanted = wanted
        self.present = present
        self.records = records or {}
        self.retried_rows = retried_rows
        """Rows that a retry round tries again; this shard drops them as `retried`."""
        self.waited_s = 0.0
        """Seconds spent waiting for other tasks of the same worker; not counted as this task's own."""
        self.results: dict[str, GroupResult] = {}
        self._outputs: dict[str, dict[str, Path]] = {}
        self._copies: dict[str, Path] = {}

    def input(self, group: str) -> Path:
        """The committed file of `group` for this shard, or a local copy of it, with the bytes that were committed.

        Raises:
            MachineError: the file was changed since then.
        """
        note_progress()
        record = self.record(group)
        if record is None:
            raise FileNotFoundError(f"{group}/{self.shard.name} is not committed in {self.run.url}")
        file = record.file
        if file.path not in self._copies:
            self._copies[file.path] = self.run.proven_copy(file)
        return self._copies[file.path]

    def record(self, group: str) -> Record | None:
        """The completion record of `group` for this shard; None if it is not finished."""
        return self.records.get(group) or self.run.read_record(group, self.shard.name)

    def has(self, group: str) -> bool:
        """True if `group` was committed for this shard when the task was planned."""
        return group in self.present

    def output(self, group: str, suffix: str) -> Path:
        """A temporary path for the group's file; the engine publishes it once the stage has returned."""
        outputs = self._outputs.setdefault(group, {})
        name = f"{self.run.group_folder(group)}/{self.shard.name}{suffix}"
        if name not in outputs:
            outputs[name] = self.run.storage.new_file(name)
        return outputs[name]

    def done(self, group: str, result: GroupResult) -> None:
        """Declares the group's files complete."""
        note_progress()
        self.results[group] = result

    def outputs(self, group: str) -> dict[str, Path]:
        """Final name -> temporary path."""
        return self._outputs.get(group, {})

    def release(self) -> None:
        """Removes temporary files and copies."""
        for outputs in self._outputs.values():
            for local in outputs.values():
                local.unlink(missing_ok=True)
        for copy in self._copies.values():
            self.run.storage.release(copy)


class Stage(ABC):
    """One step. Cheap to build and to pickle; `setup` loads models in the worker."""

    name: str
    identity: ClassVar[str]
    """Names the stage in fingerprints, so that its class may be renamed; the class's name if it is not set."""
    version: ClassVar[int] = 1
    """Raised when the code changes what it writes for the same config and input."""
    inputs: tuple[str, ...] = ()
    """Groups it reads."""
    groups: tuple[Group, ...]
    """Groups it writes."""
    resources: Resources = Resources()
    max_workers: int | None = None
    """None means stateless tasks; a number is the maximum of long-lived workers that keep what `setup` loaded."""
    tasks_per_worker: int = 1
    """Tasks that a long-lived worker may run at once, in threads: while one computes, another reads or writes.
    `process` must then be thread-safe."""
    modules: tuple[str, ...] = ()
    """Large modules that `setup` and `process` import. Where workers can be forked, they are imported once for all."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "identity" not in cls.__dict__:
            cls.identity = cls.__name__

    def setup(self, run: RunFolder) -> None:  # noqa: B027
        """Loads models; called once in each worker, before the first `process`.

        Raises:
            PipelineError: no shard can succeed (model files or a package are missing); ends the run.
        """

    @abstractmethod
    def process(self, task: Task) -> None:
        """Writes the wanted groups of one shard.

        Must be a pure function of the config and the input rows. A bad sample is a `Drop`, never an
        exception; an exception means that the shard failed and is retried. Calls `note_progress` as it gets on.
        """

    def estimate_bytes(self, group: str, num_rows: int) -> int | None:
        """Bytes on disk of the group for this number of rows; None if it is not known in advance."""
        return None

    def workload(
        self, captions: RowsOfCaptions, further: CaptionsBySet | None = None, to_do: Set[str] | None = None
    ) -> Workload | None:
        """Counts the work on a shard whose rows have these captions, and these of further sets by the set's name; None
        if it cannot be counted. Of groups that are not to do, where that is given, only the bytes count."""
        return None
