"""What a source is: a stream of shards in the driver, and the reading of one shard in a worker."""

import sqlite3
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import xxhash

from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.sources.annotations import Annotations


@dataclass(frozen=True, slots=True)
class Original:
    """One input row as fetched: either the image's bytes, or the reason why there are none."""

    row: int
    """Position in the shard, from 0."""
    key: str
    url: str | None
    captions: tuple[str, ...]
    data: bytes | None = None
    reason: str | None = None
    """Enumerated reason of a drop, such as `http_404`."""
    detail: str = ""
    annotations: Annotations = field(default_factory=dict)
    """The writing in the image, as far as the source tells."""


@dataclass(frozen=True, slots=True)
class PrecomputedEmbedding:
    """An array that came with a row, or the reason why there is none."""

    where: str
    """Names file and row in errors."""
    array: np.ndarray | None = None
    reason: str = ""
    """Enumerated reason of a drop, such as `missing_embedding`."""
    detail: str = ""


Emit = Callable[[Original], None]
Row = list[object]
"""What a source needs to read one input row; JSON-able."""


@dataclass(frozen=True, slots=True)
class InputPart:
    """A part of the input that is noted as a whole: a file, some rows of a table, an image of a folder."""

    path: str
    """Relative to the source's folder."""
    bytes: int | None = None
    """Size of the file; None where it is not known."""
    name: str = ""
    """What the rows call the file, if they name it."""
    first: int = 0
    """Rows of the same table that belong to earlier pieces."""
    rows: int | None = None
    """How many rows; None for all there are."""
    batch: int = 0
    """Pieces that were found by the same run; no shard has rows of two batches."""


class Source(ABC):
    """Where samples come from."""

    @property
    def grows(self) -> bool:
        """True if the pieces are tables to which rows may be appended."""
        return False

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
    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, Row]]:
        """Streams the rows of `pieces`, each with its piece. Keys and duplicates depend on the rows before."""

    def count_rows(self, path: str) -> int:
        """How many rows a table has now; only of a source that `grows`."""
        raise NotImplementedError

    def shards(self, shard_size: int, parts: Iterable[InputPart] | None = None) -> Iterator[Shard]:
        """Streams the rows of `pieces`, by default of all there are, as shards, without holding them in memory."""
        return cut_into_shards(self.rows(self.parts() if parts is None else parts), shard_size)

    @abstractmethod
    def fetch(self, shard: Shard, wanted: frozenset[str] | None, scratch: Path, emit: Emit) -> None:
        """Reads the shard's rows, in any order.

        Args:
            wanted: keys to read; None for all. Rows not wanted may be left out.
            scratch: an empty folder for temporary files, removed afterwards.
            emit: called once for each row.
        """

    def prepare(self) -> None:  # noqa: B027
        """Loads the packages that `fetch` needs; called once in each worker."""

    def describe_array(self, name: str) -> dict[str, object]:
        """How the arrays of this name are found, for the fingerprint of what is made of them; no paths.

        Raises:
            ConfigError: the source has none of this name.
        """
        raise ConfigError(
            f"encoders: array {name!r} is asked for, but only webdataset and parquet bring arrays; give source.kind"
        )

    def given(self, shard: Shard, name: str, rows: Sequence[int]) -> Iterator[PrecomputedEmbedding]:
        """Reads the arrays of this name of some rows of a shard, in the order given.

        Raises:
            ConfigError: an array that cannot be of that row, or is not one of numbers.
        """
        raise NotImplementedError

    def captions(self, shard: Shard) -> list[tuple[str, ...]]:
        """The cleaned captions of the shard's rows. Reads the rows, unless the source knows a shorter way."""
        found: list[tuple[str, ...]] = []
        with tempfile.TemporaryDirectory() as scratch:
            self.fetch(shard, None, Path(scratch), lambda original: found.append(original.captions))
        return found

    def estimate_rows(self) -> int | None:
        """About how many rows there are, from sizes and footers alone; None where that would take a full pass."""
        return None

    def fingerprint(self) -> dict[str, object]:
        """What of the configuration decides the rows' content; no paths, so that data may be moved."""
        return {}


def cut_into_shards(rows: Iterable[tuple[InputPart, Row]], shard_size: int) -> Iterator[Shard]:
    """Cuts a stream of rows into shards; a batch ends with a shard of its own."""
    index = 0
    for _, batch in groupby(rows, key=lambda found: found[0].batch):
        while shard_rows := list(islice(batch, shard_size)):
            files = {part.name: part.path for part, _ in shard_rows if part.name}
            yield Shard(index, [row for _, row in shard_rows], len(shard_rows), files)
            index += 1


class KeyRegistry:
    """Tells which keys were seen before, exactly, in little memory (SQLite in a temporary file)."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")
        self._database.execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")

    def is_new(self, key: str) -> bool:
        """Notes the key; True the first time."""
        short = xxhash.xxh3_128_digest(key.encode("utf-8", "surrogatepass"))
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (short,)).rowcount == 1

    def close(self) -> None:
        self._database.close()


def mark_duplicates(rows: Iterable[tuple[InputPart, Row]]) -> Iterator[tuple[InputPart, Row]]:
    """Appends to each row whether its key, its first item, came before (True: a duplicate, to be dropped)."""
    registry = KeyRegistry()
    try:
        for part, row in rows:
            yield part, [*row, not registry.is_new(str(row[0]))]
    finally:
        registry.close()


def require_path(path: str | None, kind: str) -> str:
    """The configured path.

    Raises:
        ConfigError: it was not given.
    """
    if not path:
        raise ConfigError(f"source.path: needed for source.kind={kind}, but not given; set source.path=...")
    return path
