"""A parquet file whose columns of embeddings are written as they are stored.

pyarrow makes two numbers for each float, which say in which lists it begins, and takes longer for them than for the
floats. Here it writes row groups with empty lists in the place of embeddings; its pages are taken over, and those of
the embeddings are the arrays' own bytes behind such numbers as runs, a few for each token.
Source: parquet-format 2.11, Encodings.md (PLAIN, RLE), README.md (nested encoding), parquet.thrift.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.exports.thrift import I32, STRUCT, Struct, read_struct, struct_bytes, varint_bytes

_MAGIC = b"PAR1"
_PAGE_BYTES = 1 << 20
Embeddings = Sequence[Sequence[np.ndarray]]
"""Of each row its captions' embeddings, all (n_tokens, dim), or all (n_tokens, layers, dim)."""


class ParquetFile:
    """Writes a file, a row group at a time."""

    def __init__(self, path: Path, options: Mapping[str, Any]):
        """
        Args:
            options: of `pyarrow.parquet.write_table`. They must not compress columns of embeddings, nor encode them
                in another way than PLAIN.
        """
        self._file, self._options = path.open("wb"), options
        self._file.write(_MAGIC)
        self._footer: Struct = {}

    def write(self, table: pa.Table, embeddings: Mapping[str, tuple[Sequence[int], Embeddings]]) -> None:
        """Writes a row group.

        Args:
            table: has empty lists in the columns of embeddings.
            embeddings: shape of a token, and the embeddings of each row, by the column's name.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=len(table), **self._options)
        data = sink.getvalue().to_pybytes()
        size = int.from_bytes(data[-8:-4], "little")
        footer = read_struct(data[-8 - size : -8])
        (group,) = footer[4][1][1]
        chunks: list[Struct] = [chunk[3][1] for chunk in group[1][1][1]]
        begin = self._file.tell()
        for chunk in chunks:
            name = chunk[3][1][1][0].decode()
            if name in embeddings:
                self._write_embeddings(chunk, *embeddings[name])
            else:
                self._copy(chunk, data)
        ordinal = len(self._footer[4][1][1]) if self._footer else 0
        written = {2: sum(chunk[6][1] for chunk in chunks), 5: begin, 6: self._file.tell() - begin, 7: ordinal}
        group.update({number: (group[number][0], value) for number, value in written.items() if number in group})
        if not self._footer:
            self._footer = footer
            return
        self._footer[4][1][1].append(group)
        self._footer[3] = self._footer[3][0], self._footer[3][1] + footer[3][1]

    def _copy(self, chunk: Struct, data: bytes) -> None:
        offsets = [number for number in (9, 11) if number in chunk]  # of data pages, of a dictionary
        first = min(chunk[number][1] for number in offsets)
        moved = self._file.tell() - first
        for number in offsets:
            chunk[number] = chunk[number][0], chunk[number][1] + moved
        self._file.write(memoryview(data)[first : first + chunk[7][1]])

    def _write_embeddings(self, chunk: Struct, token_shape: Sequence[int], rows: Embeddings) -> None:
        begin = self._file.tell()
        num_values = 0
        for count, parts in _pages(token_shape, rows):
            self._file.writelines(parts)
            num_values += count
        size = self._file.tell() - begin
        for number, value in {5: num_values, 6: size, 7: size, 9: begin}.items():
            chunk[number] = chunk[number][0], value
        for number in (11, 12, 13, 16):  # a dictionary, and statistics, of what pyarrow wrote
            chunk.pop(number, None)

    def close(self) -> None:
        """Writes the footer."""
        footer = struct_bytes(self._footer)
        self._file.write(footer + len(footer).to_bytes(4, "little") + _MAGIC)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _pages(token_shape: Sequence[int], rows: Embeddings) -> Iterator[tuple[int, list[bytes | memoryview]]]:
    """Number of values, and parts, of each page of the column."""
    levels = _Levels(token_shape)
    values: list[memoryview] = []
    num_bytes = 0
    for number, arrays in enumerate(rows, 1):
        levels.add(arrays)
        values += [array.ravel().view(np.uint8).data for array in arrays]
        num_bytes += sum(array.nbytes for array in arrays)
        if num_bytes >= _PAGE_BYTES or number == len(rows):
            encoded = levels.encoded()
            size = len(encoded) + num_bytes
            described = {1: (I32, levels.count), 2: (I32, 0), 3: (I32, 3), 4: (I32, 3)}  # PLAIN, and RLE twice
            header = {1: (I32, 0), 2: (I32, size), 3: (I32, size), 5: (STRUCT, described)}
            yield levels.count, [struct_bytes(header), encoded, *values]
            levels, values, num_bytes = _Levels(token_shape), [], 0


class _Levels:
    """Where lists begin (repetition), and how much of what is nested is there (definition), as runs of equal numbers.

    Axes are numbered from 0, captions, 1, tokens, to that of the floats; all are lists that could be NULL, as are
    floats.
    """

    def __init__(self, token_shape: Sequence[int]):
        depth = 2 + len(token_shape)
        *outer, dim = token_shape
        self._rest = _run(depth, dim - 1)
        """Of a token, what comes after its first float."""
        for level, length in zip(range(depth - 1, 0, -1), reversed(outer), strict=False):
            self._rest += (_run(level, 1) + self._rest) * (length - 1)
        self._is_there = 2 * depth + 1
        self._repetition: list[bytes] = []
        self._definition: list[bytes] = []
        self.count = 0
        """Number of values; an empty list counts as one."""

    def add(self, arrays: Sequence[np.ndarray]) -> None:
        """The embeddings of a row."""
        if not arrays:
            self._add(_run(0, 1), _run(1, 1), 1)
        for number, array in enumerate(arrays):
            first = _run(min(number, 1), 1)
            if len(array):
                tokens = first + self._rest + (_run(2, 1) + self._rest) * (len(array) - 1)
                self._add(tokens, _run(self._is_there, array.size), array.size)
            else:
                self._add(first, _run(3, 1), 1)

    def _add(self, repetition: bytes, definition: bytes, count: int) -> None:
        self._repetition.append(repetition)
        self._definition.append(definition)
        self.count += count

    def encoded(self) -> bytes:
        """Both, each behind its length in bytes."""
        both = (b"".join(self._repetition), b"".join(self._definition))
        return b"".join(len(runs).to_bytes(4, "little") + runs for runs in both)


def _run(level: int, count: int) -> bytes:
    """As many equal levels; a level takes less than 8 bits, so one byte."""
    return varint_bytes(count << 1) + bytes((level,)) if count else b""
