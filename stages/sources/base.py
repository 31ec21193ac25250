"""What a source is: a stream of shards in the driver, and the reading of one shard in a worker."""

import sqlite3
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.errors import ConfigError
from pipeline.stage import Shard


@dataclass(frozen=True, slots=True)
class Original:
    """One input row as fetched: either the picture's bytes, or the reason why there are none."""

    row: int
    """Position in the shard, from 0."""
    key: str
    url: str | None
    captions: tuple[str, ...]
    data: bytes | None = None
    reason: str | None = None
    """Enumerated reason of a drop, such as `http_404`."""
    detail: str = ""


Emit = Callable[[Original], None]


class Source(ABC):
    """Where samples come from."""

    @abstractmethod
    def check(self) -> None:
        """Opens the source far enough to refuse what cannot work.

        Raises:
            ConfigError: the path is missing, holds nothing, or lacks a configured column.
        """

    @abstractmethod
    def shards(self, shard_size: int) -> Iterator[Shard]:
        """Streams the input as shards, in a fixed order, without holding it in memory."""

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


def cut_into_shards(rows: Iterable[Sequence[object]], shard_size: int) -> Iterator[Shard]:
    """Groups a stream of JSON-able rows into shards."""
    index = 0
    batch: list[Sequence[object]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == shard_size:
            yield Shard(index, batch, len(batch))
            index, batch = index + 1, []
    if batch:
        yield Shard(index, batch, len(batch))


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


def mark_duplicates(keys_and_rows: Iterable[tuple[str, list[object]]]) -> Iterator[list[object]]:
    """Appends to each row whether its key came before (True: a duplicate, to be dropped)."""
    registry = KeyRegistry()
    try:
        for key, row in keys_and_rows:
            yield [*row, not registry.is_new(key)]
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
