"""Sources whose rows are those of tables: the driver reads columns; a shard is a range of rows and their digest."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa

from pipeline.stage import Shard
from stages.sources.base import COPY, InputPart, KeyRegistry, Source, SourceRow
from stages.sources.files import base_folder
from stages.sources.records.regular import Chunk
from stages.sources.records.row_text import RowTexts, list_text
from stages.sources.tables import count_rows, table_format

if TYPE_CHECKING:
    from stages.sources.tabular.where import RowFilter


class Marks(Protocol):
    """Says which rows repeat the key of an earlier one."""

    def repeats(self, keys: Sequence[str]) -> list[bool]:
        """Of the next rows."""
        ...


class _Unmarked:
    def repeats(self, keys: Sequence[str]) -> list[bool]:
        return [False] * len(keys)


class _KnownMarks:
    """Of the rows of a shard, whose positions that repeat a key are known."""

    def __init__(self, positions: Sequence[int]):
        self._positions, self._at = frozenset(positions), 0

    def repeats(self, keys: Sequence[str]) -> list[bool]:
        first, self._at = self._at, self._at + len(keys)
        return [position in self._positions for position in range(first, self._at)]


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one part."""

    part: InputPart
    first: int
    """Number of the first row in its file."""
    number: int
    """Number of the first row in all parts."""
    texts: RowTexts
    repeats: Sequence[bool] | None
    """Which rows repeat a key; None: none does."""
    near: bool = False
    """Whether a worker may read the rows of a shard by itself."""
    places: np.ndarray | None = None
    """Where the rows are among those of the file from `first` on, if `where` left some out; increasing."""
    filtered: int = 0
    """How many rows `where` left out."""
    cells: Mapping[str, RowTexts] = field(default_factory=dict)
    """The cells of further columns in the same rows, see `Shard.cells`."""

    def place(self, row: int) -> int:
        """Which of the rows of the file from `first` on a row of the block is."""
        return row if self.places is None else int(self.places[row])


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of a file."""

    path: str
    name: str
    first: int
    rows: int
    number: int
    """Of its first row in all parts."""


@dataclass(frozen=True, slots=True)
class TableRange:
    """The rows of a shard of tables; a `RowRange`."""

    source: "TableSource"
    spans: tuple[Span, ...]
    """Rows that `where` leaves out may be in them."""
    repeated: tuple[int, ...]
    """Positions in the shard of rows that repeat a key."""
    near: bool

    def read(self) -> tuple[bytes, dict[str, bytes]]:
        marks = _KnownMarks(self.repeated)
        pieces: list[tuple[Block, int, int]] = []
        with self.source.reaching():
            for span in self.spans:
                part = InputPart(span.path, name=span.name, first=span.first, rows=span.rows)
                blocks = self.source.blocks([part], marks, span.number)
                pieces += [(block, 0, block.texts.num_rows) for block in blocks]
        return _text_of(pieces), _cells_of(pieces)


class TableSource(Source):
    """The rows of a shard are read where it is needed; those of text, and of large row groups, by the driver, which
    reads on from one shard to the next."""

    path: str
    row_filter: "RowFilter | None" = None
    """Of `source.where`."""

    @cached_property
    def folder(self) -> str:
        """What the paths of parts are relative to."""
        return base_folder(self.path)

    @abstractmethod
    def settings(self) -> object:
        """All that the rows depend on besides the files."""

    @abstractmethod
    def blocks(self, parts: Iterable[InputPart], marks: Marks, number: int = 0) -> Iterator[Block]:
        """Streams the rows of `parts`.

        Args:
            marks: asked for all rows, in order.
            number: of the first row, in all parts.
        """

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        for block in self.blocks(parts, _Unmarked()):
            for position in range(block.texts.num_rows):
                shard = Shard.of_text(0, list_text([block.texts.between(position, position + 1)]), 1)
                yield block.part, SourceRow.from_json(shard.rows[0], self.layout)

    def shards(self, shard_size: int, parts: Iterable[InputPart] | None = None) -> Iterator[Shard]:
        self.filtered = 0
        found = self.ranged_shards(shard_size, self.parts() if parts is None else parts)
        return (shard for shard, _ in found)

    def ranged_shards(
        self, shard_size: int, parts: Iterable[InputPart], index: int = 0, number: int = 0
    ) -> Iterator[tuple[Shard, TableRange]]:
        """The shards of `parts`, each with where its rows are.

        Args:
            index: of the first shard.
            number: of the first row.
        """
        registry = KeyRegistry() if self.keys_may_repeat else None
        try:
            with self.reaching():
                blocks = self._counted(self.blocks(parts, registry or _Unmarked(), number))
                for _, batch in groupby(blocks, key=lambda block: block.part.batch):
                    for pieces in _cut(batch, shard_size):
                        yield self._shard(index, pieces)
                        index += 1
        finally:
            if registry is not None:
                registry.close()

    def unread_shards(
        self, shard_size: int, parts: Sequence[InputPart], index: int = 0, number: int = 0
    ) -> Iterator[Shard] | None:
        """The same shards, of which nobody has read a row or made a digest; None if only the rows tell which they are.

        Footers of Parquet say how many rows there are; but not which of them a condition keeps, or which keys repeat.
        """
        if self.row_filter is not None or self.keys_may_repeat:
            return None
        if any(table_format(part.path) != "parquet" for part in parts):
            return None
        return self._unread(shard_size, parts, index, number)

    def _unread(self, shard_size: int, parts: Sequence[InputPart], index: int, number: int) -> Iterator[Shard]:
        for _, batch in groupby(parts, key=lambda part: part.batch):
            found: list[tuple[InputPart, Span]] = []
            missing = shard_size
            for part in batch:
                first = part.first
                with self.reaching():
                    total = count_rows(f"{self.folder}/{part.path}") if part.rows is None else first + part.rows
                while first < total:
                    rows = min(missing, total - first)
                    found.append((part, Span(part.path, part.name, first, rows, number)))
                    first, number, missing = first + rows, number + rows, missing - rows
                    if not missing:
                        yield self._unread_shard(index, found)
                        found, missing, index = [], shard_size, index + 1
            if found:
                yield self._unread_shard(index, found)
                index += 1

    def _unread_shard(self, index: int, found: Sequence[tuple[InputPart, Span]]) -> Shard:
        rows = TableRange(self, tuple(span for _, span in found), (), False)
        return Shard.of_range(
            index, rows, None, sum(span.rows for _, span in found), files_of(part for part, _ in found)
        )

    def _counted(self, blocks: Iterable[Block]) -> Iterator[Block]:
        for block in blocks:
            self.filtered += block.filtered
            yield block

    def _shard(self, index: int, pieces: Sequence[tuple[Block, int, int]]) -> tuple[Shard, TableRange]:
        text, cells = _text_of(pieces), _cells_of(pieces)
        num_rows = sum(end - first for _, first, end in pieces)
        files = files_of(block.part for block, _, _ in pieces)
        shard = Shard.of_text(index, text, num_rows, files, cells)
        spans = tuple(_span(*piece) for piece in pieces)
        near = all(block.near for block, _, _ in pieces)
        rows = TableRange(self, spans, repeated_of(pieces), near)
        if near:
            shard = Shard.of_range(index, rows, shard.digest, num_rows, files, shard.cell_digests)
        return shard, rows


def kept_of(chunk: Chunk | range, row_filter: "RowFilter | None") -> tuple[Chunk, np.ndarray]:
    """The rows of a chunk that are kept, and their positions in it; of a range, which nobody has read, none."""
    if isinstance(chunk, range):
        return [], np.zeros(0, np.int64)
    if row_filter is None:
        return chunk, np.arange(len(chunk))
    places = row_filter.places(chunk)
    if isinstance(chunk, list):
        return [chunk[place] for place in places], places
    return (chunk if len(places) == len(chunk) else chunk.take(pa.array(places))), places


def _text_of(pieces: Sequence[tuple[Block, int, int]]) -> bytes:
    return list_text(block.texts.between(first, end) for block, first, end in pieces)


def _cells_of(pieces: Sequence[tuple[Block, int, int]]) -> dict[str, bytes]:
    """By column the cells of a shard, as the canonical JSON of a list."""
    columns = pieces[0][0].cells if pieces else ()
    return {
        column: list_text(block.cells[column].between(first, end) for block, first, end in pieces)
        for column in columns
    }


def _span(block: Block, first: int, end: int) -> Span:
    begin, last = block.place(first), block.place(end - 1)
    part = block.part
    return Span(part.path, part.name, block.first + begin, last + 1 - begin, block.number + begin)


def _cut(blocks: Iterable[Block], shard_size: int) -> Iterator[list[tuple[Block, int, int]]]:
    """The pieces of each shard: blocks, with the first and the end of the rows in them."""
    pieces: list[tuple[Block, int, int]] = []
    missing = shard_size
    for block in blocks:
        first = 0
        while first < block.texts.num_rows:
            end = min(block.texts.num_rows, first + missing)
            pieces.append((block, first, end))
            missing -= end - first
            first = end
            if not missing:
                yield pieces
                pieces, missing = [], shard_size
    if pieces:
        yield pieces


def files_of(parts: Iterable[InputPart]) -> dict[str, str]:
    """`Shard.files` of the parts that its rows are from."""
    files: dict[str, str] = {}
    for part in parts:
        if part.name:
            files[part.name] = part.path
            if part.copy:
                files[part.name + COPY] = part.copy
    return files


def repeated_of(pieces: Sequence[tuple[Block, int, int]]) -> tuple[int, ...]:
    """Positions in a shard of the rows that repeat a key."""
    found: list[int] = []
    at = 0
    for block, first, end in pieces:
        repeats = block.repeats or ()
        found += [at + place for place, repeated in enumerate(repeats[first:end]) if repeated]
        at += end - first
    return tuple(found)
