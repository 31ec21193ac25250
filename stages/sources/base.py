"""What a source is: a stream of shards in the driver, and the reading of one shard in a worker."""

import sqlite3
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from imagen_core.store import ColumnType
from pipeline.errors import ConfigError
from pipeline.stage import Shard
from pipeline.storage.scratch import temporary_folder
from stages.captions import clean_captions
from stages.sources.annotations import Annotations, AnnotationsConfig, has_label
from stages.sources.records.cells import BadCell
from stages.sources.records.far import reaching

PAYLOAD = "payload"
_DROP = "drop"
_INSERT = "INSERT OR IGNORE INTO seen VALUES (?)"
COPY = "\0copy"
"""Behind a file's name in `Shard.files`: the path of a copy on the driver's machine."""
MAX_FILE_BYTES = 2**30
"""Of a file of a sample whose size is known before it is read; larger ones are the drop `too_large`."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One input row as the driver sees it: everything that a worker needs to fetch it.

    In a shard it is a list, whose digest recognises finished work. `Source.layout` names the fields in that list.
    """

    key: str
    name: str = ""
    """What the source calls the file that the row is in, if it has several."""
    url: str | None = None
    captions: Sequence[str] | None = None
    """Not cleaned yet. None: the source has no captions, or they are read by the worker."""
    payload: tuple[Any, ...] = ()
    """Where the worker finds the row, and digests of it; JSON-able, and never content of the sample itself."""
    annotations: Annotations = field(default_factory=dict)
    is_duplicate: bool = False
    """True if the key came before; the row is dropped."""
    drop: tuple[str, str] | None = None
    """Reason and detail, if the driver found that the row cannot be used; then it ends the list."""
    position: int = 0
    """Position in the shard, from 0. Not part of the list."""

    def to_json(self, layout: Sequence[str]) -> list[Any]:
        """The values of the fields that `layout` names; the items of the payload lie side by side."""
        values: list[Any] = []
        for name in layout:
            values += self.payload if name == PAYLOAD else [getattr(self, name)]
        return values if self.drop is None else [*values, {_DROP: self.drop}]

    @classmethod
    def from_json(cls, values: Sequence[Any], layout: Sequence[str], position: int = 0) -> Self:
        """The row that `to_json` wrote with the same layout."""
        values, drop = list(values), None
        if values and isinstance(values[-1], dict) and values[-1].keys() == {_DROP}:
            drop = tuple(values.pop()[_DROP])
        if PAYLOAD in layout:
            start = layout.index(PAYLOAD)
            end = len(values) - (len(layout) - start - 1)
            values[start:end] = [tuple(values[start:end])]
        return cls(**dict(zip(layout, values, strict=True)), drop=drop, position=position)

    def redacted(self) -> Self:
        """The row without the URL, captions and annotations of its sample."""
        return replace(
            self,
            url=None if self.url is None else "",
            captions=None if self.captions is None else [],
            annotations={},
            drop=None if self.drop is None else (self.drop[0], ""),
        )

    def dropped(self, bad: BadCell) -> Self:
        """The row if one of its cells cannot be used."""
        return replace(self, drop=(bad.reason, bad.detail))


@dataclass(frozen=True, slots=True)
class Original:
    """One input row as fetched: either the image's bytes, or the reason why there are none."""

    row: int
    """Position in the shard, from 0."""
    key: str
    url: str | None
    captions: tuple[str, ...] | None
    """None: the source has no captions, or the row was dropped before they were read."""
    data: bytes | None = None
    reason: str | None = None
    """Enumerated reason of a drop, such as `http_404`."""
    detail: str = ""
    annotations: Annotations = field(default_factory=dict)
    """What the source tells of the image in addition to captions."""
    orientation: int | None = None
    """EXIF orientation (1 to 8) that the source tells, for a file that has none itself."""

    @classmethod
    def of(cls, row: SourceRow, data: bytes | None = None) -> Self:
        """A row whose URL, captions and annotations the driver has read."""
        captions = None if row.captions is None else tuple(row.captions)
        return cls(row.position, row.key, row.url, captions, data, annotations=row.annotations)

    @classmethod
    def dropped(cls, row: SourceRow, reason: str, detail: str = "") -> Self:
        """A row that is dropped before its captions are read."""
        return cls(row.position, row.key, row.url, None, None, reason, detail, row.annotations)

    def cleaned(self) -> Self:
        """With clean captions. A row without a usable caption is dropped for that, whatever else is wrong with it.

        A row with a class needs no caption; then it has the empty caption.
        """
        if self.captions is None and self.reason is not None:
            return replace(self, captions=(), data=None)
        captions, reason = clean_captions(self.captions)
        if reason == "empty_caption" and has_label(self.annotations):
            captions, reason = clean_captions(None)
        if reason is not None:
            return replace(self, captions=captions, data=None, reason=reason, detail="")
        return replace(self, captions=captions, data=None if self.reason else self.data)


@dataclass(frozen=True, slots=True)
class PrecomputedEmbedding:
    """An array that came with a row, or the reason why there is none."""

    where: str
    """Names file and row in errors."""
    array: np.ndarray | None = None
    reason: str = ""
    """Enumerated reason of a drop, such as `missing_embedding`."""
    detail: str = ""
    has_own_file: bool = False
    """True if no other row has its array in the same file: then another width is the fault of this row alone."""


Emit = Callable[[Original], None]


@dataclass(frozen=True, slots=True)
class InputPart:
    """A part of the input that is recorded as one: a file, some rows of a table, an image of a folder."""

    path: str
    """Relative to the source's folder."""
    bytes: int | None = None
    """Size of the file; None where it is not known."""
    name: str = ""
    """What the rows call the file, if they name it."""
    first: int = 0
    """Rows of the same table that belong to earlier parts."""
    rows: int | None = None
    """How many rows; None: all rows of the file."""
    copy: str = ""
    """Path of a copy of the file on the driver's machine, if there is one."""
    batch: int = 0
    """Parts that were found by the same run; no shard has rows of two batches."""


class Source(ABC):
    """Where samples come from.

    A new kind needs a config, `check`, `parts`, the `rows` of parts with their `layout`, and `fetch`. Captions are
    cleaned, duplicates dropped and annotations checked by the fetch stage, for all sources alike.
    """

    layout: tuple[str, ...]
    """The fields of `SourceRow` that the rows of this source have in a shard, in order, the key first. It decides the
    digest of every shard, so a change makes finished runs stale."""
    keys_may_repeat: bool = False
    """True if two rows may have the same key: then the second one is marked as a duplicate."""
    rows_stand_alone: bool = False
    """True if the rows of a file are the same whatever other files there are, but for the names that keys begin with;
    and if it takes long to find out how many there are."""
    has_images_at_hand: bool = False
    """True if the images are in the files of the input, so that a plan may look at some."""
    has_cells_apart: bool = False
    """True if the digest of a shard does not cover columns of further captions: these have digests of their own, see
    `Shard.cells`."""
    filtered: int = 0
    """How many rows `source.where` left out in the last pass over all shards; no shard has them."""
    unread_bytes: int = 0
    """How many bytes of damaged files the last pass by `rows` could not read; each such file has a drop besides."""

    @cached_property
    def ignored_files(self) -> Counter[str]:
        """How many files the last listing by `parts` ignored, by rule."""
        return Counter()

    @cached_property
    def ignored_members(self) -> Counter[str]:
        """How many files or members the last pass by `rows` ignored, by rule."""
        return Counter()

    @property
    def ignored(self) -> Counter[str]:
        """How many files and members are no data, by rule; known after a pass over all rows."""
        return self.ignored_files + self.ignored_members

    @property
    def passed_over(self) -> dict[str, Any]:
        """What the last pass over all rows left out: `filtered`, `unread_bytes`, and `ignored` by rule."""
        return {"filtered": self.filtered, "unread_bytes": self.unread_bytes, "ignored": dict(self.ignored)}

    @passed_over.setter
    def passed_over(self, counts: Mapping[str, Any]) -> None:
        """Takes what another process counted, instead of a pass."""
        self.filtered, self.unread_bytes = counts["filtered"], counts["unread_bytes"]
        self.ignored_files.clear()
        self.ignored_members.clear()
        self.ignored_members.update(counts["ignored"])

    @property
    def column_types(self) -> dict[str, ColumnType]:
        """Types of the columns that the store keeps; known after `check`."""
        config = getattr(self, "config", None)
        kept = config.keep_columns if isinstance(config, AnnotationsConfig) else {}
        return {name: kind for name, kind in kept.items() if kind is not None}

    @property
    def grows(self) -> bool:
        """True if the parts are tables to which rows may be appended."""
        return False

    def resume(self, begun_with: InputPart | None) -> None:  # noqa: B027
        """Takes what the run folder has of the input, before `check`.

        Args:
            begun_with: the first part that the run's first start recorded; None at its first start.
        """

    @abstractmethod
    def check(self) -> None:
        """Opens the source far enough to refuse what cannot work.

        Raises:
            ConfigError: the path is missing, holds nothing, or lacks a configured column.
        """

    @abstractmethod
    def parts(self) -> Iterator[InputPart]:
        """Streams what there is now, in a fixed order."""

    @abstractmethod
    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        """Streams the rows of `parts`, each with its part. Row numbers in keys count over all parts."""

    def begin_run(self) -> None:  # noqa: B027
        """Called by the driver of a run before it reads rows: they will be fetched too, which a plan does not."""

    def count_rows(self, path: str) -> int:
        """How many rows a table has now; only of a source that `grows`."""
        raise NotImplementedError

    def shards(self, shard_size: int, parts: Iterable[InputPart] | None = None) -> Iterator[Shard]:
        """Streams the rows of `parts`, by default of all parts, as shards, without holding them in memory."""
        self.filtered = 0
        with self.reaching():
            rows = self.rows(self.parts() if parts is None else parts)
            rows = mark_duplicates(rows) if self.keys_may_repeat else rows
            yield from split_into_shards(rows, shard_size, self.layout)

    def reaching(self) -> AbstractContextManager[None]:
        """Where the driver of a run reads the source: what URLs raise becomes an error with words.

        Raises:
            ConfigError: a URL leads to nothing.
            MachineError: a URL cannot be reached, or its server refuses.
        """
        return reaching(getattr(self, "path", ""))

    def rows_of(self, shard: Shard) -> list[SourceRow]:
        """The rows of a shard, with their positions."""
        return [SourceRow.from_json(row, self.layout, position) for position, row in enumerate(shard.rows)]

    @abstractmethod
    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        """Reads rows of a shard, in any order.

        Args:
            rows: the ones to read, none of them a duplicate or dropped.
            scratch: an empty folder for temporary files, deleted afterwards.
            emit: called once per row, with captions and annotations as they are.
        """

    def prepare(self) -> None:  # noqa: B027
        """Loads the packages that `fetch` needs; called once in each worker."""

    def describe_array(self, name: str) -> dict[str, object]:
        """How the arrays of this name are found, for the fingerprint of what is made of them; no paths.

        Raises:
            ConfigError: the source has none of this name.
        """
        raise ConfigError(
            f"encoders: array {name!r} is requested, but only webdataset, parquet, folder and mds bring arrays; give "
            "source.kind"
        )

    def precomputed(self, shard: Shard, name: str, positions: Sequence[int]) -> Iterator[PrecomputedEmbedding]:
        """Reads the arrays of this name of some rows of a shard, in the order of `positions`.

        Raises:
            ConfigError: an array that cannot belong to its row, or does not hold numbers.
        """
        raise NotImplementedError

    def captions(self, shard: Shard) -> list[tuple[str, ...]]:
        """The cleaned captions of the shard's rows, duplicates left out; fetches the rows if they have no captions."""
        rows = [row for row in self.rows_of(shard) if not row.is_duplicate and row.drop is None]
        if "captions" in self.layout:
            return [Original.of(row).cleaned().captions or () for row in rows]
        found: list[tuple[str, ...]] = []
        with temporary_folder() as scratch:
            self.fetch(shard, rows, scratch, lambda original: found.append(original.cleaned().captions or ()))
        return found

    def caption_cells(self, shard: Shard, column: str) -> list[list[str] | None]:
        """The captions of each row of the shard in a column of further captions, as they are: none for NULL, and None
        for a cell that holds something else or cannot be read."""
        raise NotImplementedError

    def estimate_rows(self) -> int | None:
        """About how many rows there are, from sizes and footers alone; None where that would take a full pass."""
        return None

    def fingerprint(self) -> dict[str, object]:
        """The part of the configuration that decides the rows' content; no paths, so that data may be moved."""
        return {}

    def identifiers(self, row: list[object]) -> tuple[str, str | None]:
        """The key of a row of a shard, and its URL where the row has one."""
        parsed = SourceRow.from_json(row, self.layout)
        return parsed.key, parsed.url

    def redact(self, row: list[object]) -> list[object]:
        """A row of a shard without the URL, captions and annotations of its sample; its key stays."""
        return SourceRow.from_json(row, self.layout).redacted().to_json(self.layout)


def split_into_shards(
    rows: Iterable[tuple[InputPart, SourceRow]], shard_size: int, layout: Sequence[str], index: int = 0
) -> Iterator[Shard]:
    """Splits a stream of rows into shards, of which the first has this index; the last one of a batch may be
    smaller."""
    for _, batch in groupby(rows, key=lambda found: found[0].batch):
        while shard_rows := list(islice(batch, shard_size)):
            files = {part.name: part.path for part, _ in shard_rows if part.name}
            files.update({part.name + COPY: part.copy for part, _ in shard_rows if part.copy})
            yield Shard(index, [row.to_json(layout) for _, row in shard_rows], len(shard_rows), files)
            index += 1


class KeyRegistry:
    """Knows which keys came before, exactly, in little memory (SQLite in a temporary file)."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def is_new(self, key: str) -> bool:
        """Records the key; True the first time."""
        return self._insert(xxhash.xxh3_128_digest(key.encode("utf-8", "surrogatepass")))

    def repeats(self, keys: Sequence[str]) -> list[bool]:
        """Records keys; True for those that came before, also among themselves."""
        short = [xxhash.xxh3_128_digest(key.encode("utf-8", "surrogatepass")) for key in keys]
        self._database.execute("SAVEPOINT keys")
        inserted = self._database.executemany(_INSERT, zip(short)).rowcount
        if inserted < len(keys):  # seldom: then one by one
            self._database.execute("ROLLBACK TO keys")
        self._database.execute("RELEASE keys")
        return [inserted < len(keys) and not self._insert(key) for key in short]

    def _insert(self, short: bytes) -> bool:
        return self._database.execute(_INSERT, (short,)).rowcount == 1

    def close(self) -> None:
        self._database.close()


def mark_duplicates(rows: Iterable[tuple[InputPart, SourceRow]]) -> Iterator[tuple[InputPart, SourceRow]]:
    """Marks the rows whose key came before."""
    registry = KeyRegistry()
    try:
        for part, row in rows:
            yield part, row if registry.is_new(row.key) else replace(row, is_duplicate=True)
    finally:
        registry.close()


def require_path(path: str | None, kind: str) -> str:
    """The configured path.

    Raises:
        ConfigError: there is none.
    """
    if not path:
        raise ConfigError(f"source.path: needed for source.kind={kind}, but not given; set source.path=...")
    return path
