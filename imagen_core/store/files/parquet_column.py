"""Random access to the byte strings of one parquet column.

A column that is uncompressed, PLAIN, without nulls and with one page per row group has its bytes in the file as they
are: the lengths of the rows give the place of each. Such local files are mapped into memory, and no parquet code runs
to read a row. All others are decoded one row group at a time.
"""

from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq

_NUM_CACHED_ROW_GROUPS = 2


class BlobColumn:
    """Rows of a binary column; `column[i]` is uint8 (lengths[i],), possibly a read-only view.

    Args:
        source: the path, or the open file, that `file` reads.
        name: of the column.
        lengths: int64 (n,), bytes in each row.
        prefix_bytes: bytes that PLAIN puts before each row: 4 for binary, 0 for fixed-size binary.
        mapped: map the file into memory where possible.
        data: the map of the file, if there is one already.
    """

    def __init__(
        self,
        file: pq.ParquetFile,
        source: str | BinaryIO,
        name: str,
        lengths: np.ndarray,
        *,
        prefix_bytes: int,
        mapped: bool,
        data: np.ndarray | None = None,
    ) -> None:
        self._name, self._lengths = name, lengths
        meta = file.metadata
        counts = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self._first_rows = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._file: pq.ParquetFile | None = file
        self._decoded: OrderedDict[int, Any] = OrderedDict()
        self._bytes: np.ndarray | None = None
        if mapped and isinstance(source, str) and len(lengths):
            data = np.memmap(source, dtype=np.uint8, mode="r") if data is None else data
            starts = self._find_starts(meta, data, prefix_bytes)
            if starts is not None:
                self._bytes, self._file = data.view(np.ndarray), None
                self._starts, self._stops = starts.tolist(), (starts + lengths).tolist()

    @property
    def is_mapped(self) -> bool:
        """Whether rows are read from a memory map."""
        return self._bytes is not None

    def __getitem__(self, row: int) -> np.ndarray:
        if self._bytes is not None:
            return self._bytes[self._starts[row] : self._stops[row]]
        group = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        buffer = self._row_group(group)[row - int(self._first_rows[group])].as_buffer()
        if len(buffer) != self._lengths[row]:
            raise ValueError(f"row {row} of {self._name!r}: {len(buffer)} bytes, not {self._lengths[row]}")
        return np.frombuffer(buffer, dtype=np.uint8)

    def _row_group(self, group: int) -> Any:
        if group not in self._decoded:
            assert self._file is not None
            table = self._file.read_row_group(group, columns=[self._name], use_threads=False)
            self._decoded[group] = table.column(0).combine_chunks()
            if len(self._decoded) > _NUM_CACHED_ROW_GROUPS:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(group)
        return self._decoded[group]

    def _find_starts(self, meta: Any, data: np.ndarray, prefix_bytes: int) -> np.ndarray | None:
        """Offset of each row's bytes in the file, or None if this column cannot be mapped."""
        number = meta.schema.to_arrow_schema().get_field_index(self._name)
        starts = np.empty(len(self._lengths), dtype=np.int64)
        for group in range(meta.num_row_groups):
            rows = slice(int(self._first_rows[group]), int(self._first_rows[group + 1]))
            chunk = meta.row_group(group).column(number)
            ends = np.cumsum(self._lengths[rows] + prefix_bytes)
            payload_bytes = int(ends[-1]) if len(ends) else 0
            header_bytes = chunk.total_compressed_size - payload_bytes
            header = data[chunk.data_page_offset :][: max(header_bytes, 0)].tobytes()
            if (
                chunk.compression != "UNCOMPRESSED"
                or chunk.has_dictionary_page
                or not set(chunk.encodings) <= {"PLAIN", "RLE"}
                or _page_bytes(header) != payload_bytes
            ):
                return None
            starts[rows] = chunk.data_page_offset + header_bytes + ends - self._lengths[rows]
        return starts


def _page_bytes(header: bytes) -> int | None:
    """Size of an uncompressed DATA_PAGE from the first fields of its header; None for any other page.

    parquet.thrift PageHeader in the compact protocol: i32 type, i32 uncompressed size, i32 compressed
    size; each i32 is a field byte 0x15 and a zigzag varint.
    """
    values, at = [], 0
    for _ in range(3):
        if at >= len(header) or header[at] != 0x15:
            return None
        at, shift, value = at + 1, 0, 0
        while True:
            if at >= len(header):
                return None
            value |= (header[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if header[at - 1] < 0x80:
                break
        values.append((value >> 1) ^ -(value & 1))
    is_plain_page = values[0] == 0 and values[1] == values[2]
    return values[1] if is_plain_page else None
