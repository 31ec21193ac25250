"""What a step of the pipeline is: a `Stage` turns one `Shard` into files of one or more `Group`s.

A group is a column of the result (`samples`, `images-64`, `text-t5`): one or more files per shard. Each
(group, shard) is committed separately, so a group added later leaves the others untouched.
"""

import hashlib
import json
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from pipeline.errors import StaleOutputError
from pipeline.fingerprint import canonical_json
from pipeline.resources import CaptionsBySet, Resources, RowsOfCaptions, Workload
from pipeline.storage.record import Record, shard_name
from pipeline.storage.run_folder import RunFolder

_Cells = Mapping[str, bytes]
_last_sign = time.monotonic()


def note_progress() -> None:
    """Tells that this worker gets on; without such a sign for `execution.task_limit_s` it is ended. A stage tells it
    after every row, batch or the like; it costs nothing."""
    global _last_sign
    _last_sign = time.monotonic()


def seconds_without_progress() -> float:
    """Seconds since the last sign of progress in this process."""
    return time.monotonic() - _last_sign


class RowRange(Protocol):
    """The rows of a shard as a place in a file, from which they can be read again. Small, and picklable."""

    @property
    def near(self) -> bool:
        """True if a worker reads the rows; else the driver does, once the shard is needed, and sends them."""
        ...

    def read(self) -> tuple[bytes, Mapping[str, bytes]]:
        """The rows as the canonical JSON of their list; and the cells of further columns, see `Shard.cells`."""
        ...


class Shard:
    """The unit of work, retry, commit and resume: a few hundred or thousand input rows.

    A shard of a table is a range of it and a digest. Where it holds its rows, they are compressed once the shard is
    admitted: a large cluster has a thousand shards in flight, and the URLs and captions of a row take some 450 bytes
    as Python objects, and a fifth of that compressed.
    """

    __slots__ = (
        "_cells",
        "_digest",
        "_packed",
        "_packed_cells",
        "_range",
        "_text",
        "cell_digests",
        "files",
        "index",
        "num_rows",
    )

    def __init__(self, index: int, rows: object, num_rows: int, files: Mapping[str, str] | None = None):
        """
        Args:
            index: position in the source, from 0.
            rows: what the source needs to read these rows; a JSON value.
            num_rows: their number.
            files: paths of the files that the rows name; not part of the digest, so that data may be moved.
        """
        self._set(index, canonical_json(rows).encode("utf-8", "surrogatepass"), num_rows, files)

    def _set(
        self,
        index: int,
        text: bytes | None,
        num_rows: int,
        files: Mapping[str, str] | None,
        digest: str | None = None,
        rows: RowRange | None = None,
        cell_digests: Mapping[str, str] | None = None,
    ) -> None:
        self.index = index
        self.num_rows = num_rows
        self.files = files or {}
        self._digest = hashlib.sha256(text or b"").hexdigest() if rows is None and digest is None else digest
        self.cell_digests: Mapping[str, str] = cell_digests or {}
        """Of the cells of further columns, by column; see `cells`."""
        self._text, self._packed, self._range = text, b"", rows
        self._cells: _Cells = {}
        self._packed_cells: _Cells = {}

    @classmethod
    def of_text(
        cls,
        index: int,
        text: bytes,
        num_rows: int,
        files: Mapping[str, str] | None = None,
        cells: _Cells | None = None,
    ) -> Self:
        """A shard whose rows, and cells of further columns, are canonical JSON already."""
        shard = cls.__new__(cls)
        shard._set(index, text, num_rows, files)
        shard.take_cells(cells or {})
        return shard

    @classmethod
    def of_range(
        cls,
        index: int,
        rows: RowRange,
        digest: str | None,
        num_rows: int,
        files: Mapping[str, str] | None = None,
        cell_digests: Mapping[str, str] | None = None,
    ) -> Self:
        """A shard whose rows and cells are read where they are needed, and compared with the digests.

        Args:
            digest: None where nobody has read the rows; the first who needs them or the digest makes it.
        """
        shard = cls.__new__(cls)
        shard._set(index, None, num_rows, files, digest, rows, cell_digests)
        return shard

    @property
    def digest(self) -> str:
        """Fingerprint of the input rows: SHA-256 of their canonical JSON."""
        if self._digest is None:
            self._read()
        assert self._digest is not None
        return self._digest

    def take_cells(self, cells: Mapping[str, bytes]) -> None:
        """Gives the shard the cells of further columns: by column the canonical JSON of their list."""
        self._cells, self.cell_digests = cells, _digests(cells)

    def pack(self) -> None:
        """Makes the shard small, and ready to travel to a worker."""
        if self._range is not None and not self._range.near:
            self._text, self._cells = self._read_range(self._range)
            self._range = None
        if self._text is not None:
            self._packed, self._text = zlib.compress(self._text, level=1), None
        if self._cells:
            self._packed_cells = {name: zlib.compress(text, level=1) for name, text in self._cells.items()}
            self._cells = {}

    @property
    def rows(self) -> Any:
        """Read or decompressed on each call.

        Raises:
            StaleOutputError: the file that they are in was changed since the digest was made.
        """
        return json.loads(self._read().decode("utf-8", "surrogatepass"))

    def _read(self) -> bytes:
        if self._text is not None:
            return self._text
        return zlib.decompress(self._packed) if self._range is None else self._read_range(self._range)[0]

    def _read_range(self, rows: RowRange) -> tuple[bytes, Mapping[str, bytes]]:
        text, cells = rows.read()
        digest, found = hashlib.sha256(text).hexdigest(), _digests(cells)
        if self._digest is None:
            self._digest, self.cell_digests = digest, found
        if digest != self._digest or any(found[column] != self.cell_digests.get(column, "") for column in found):
            raise StaleOutputError(
                f"source.path: the rows of shard {self.name} are no longer what they were: the source was changed "
                "while the run was at work, or keeps its size and time. Restore it, or run again with --check-input."
            )
        return text, cells

    def digest_of(self, column: str | None) -> str:
        """Fingerprint of the cells of a further column; of the rows, where the shard has no such cells."""
        digest = self.digest  # first, as reading the rows makes those of the cells too
        return digest if column is None else self.cell_digests.get(column, digest)

    def cells(self, column: str) -> list[Any]:
        """The cell of each row in a further column, which is no part of the digest of the rows, so that such a column
        can be added later. Read or decompressed on each call.

        Raises:
            KeyError: the shard has no cells of this column.
            StaleOutputError: the file that they are in was changed since the digest was made.
        """
        if self._range is not None:
            text = self._read_range(self._range)[1][column]
        else:
            packed = self._packed_cells.get(column)
            text = self._cells[column] if packed is None else zlib.decompress(packed)
        return json.loads(text.decode("utf-8", "surrogatepass"))

    def __reduce__(self) -> tuple[Any, ...]:
        self.pack()
        place = (self.index, self.num_rows, self.files, self._range)
        return _unpickled, (place, (self.digest, self._packed), (self.cell_digests, self._packed_cells))

    @property
    def name(self) -> str:
        return shard_name(self.index)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Shard):
            return NotImplemented
        return (self.index, self.digest, self.files) == (other.index, other.digest, other.files)

    def __hash__(self) -> int:
        return hash((self.index, self.digest))


def _digests(cells: Mapping[str, bytes]) -> dict[str, str]:
    return {column: hashlib.sha256(text).hexdigest() for column, text in cells.items()}


def _unpickled(
    place: tuple[int, int, Mapping[str, str], RowRange | None],
    rows: tuple[str, bytes],
    cells: tuple[Mapping[str, str], Mapping[str, bytes]],
) -> Shard:
    index, num_rows, files, found = place
    (digest, packed), (cell_digests, packed_cells) = rows, cells
    shard = Shard.__new__(Shard)
    shard._set(index, None, num_rows, files, digest, found, cell_digests)
    shard._packed, shard._packed_cells = packed, packed_cells
    return shard


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
    """Further entries of the record (`excluded_rows` by reason, ...)."""


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
