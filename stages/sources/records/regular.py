"""Text tables in Arrow batches, block by block, where a block is regular: one that pyarrow's readers and the parsers
of `text` are known to read alike. Any other block is read by those parsers.

Regular is a block without control characters, lone carriage returns and bytes that are not UTF-8; in csv, quotes only
around whole cells; in jsonl, one object in every line. What pyarrow refuses is not regular either.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from stages.sources.records.cells import InvalidLine, top_levels
from stages.sources.records.text import (
    Pushback,
    Record,
    check_head,
    csv_fields,
    json_records,
    named,
    tsv_fields,
)

Chunk = pa.RecordBatch | list[Record]
"""Some rows of a table."""

_BLOCK = 2**21
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_CONTROL = np.array([byte < 32 and byte not in b"\n\r\t" for byte in range(256)])
_LONG_LINE = 1024
"""Bytes. What Python's JSON refuses, and Arrow's does not, is longer."""
_MANY_DIGITS = re.compile(rb"\d{1000}")
_MOST_BRACKETS = 200
_NO_NUMBER = re.compile(rb"[:\[,]\s*-?(?:Inf|NaN)")
"""Some of what Arrow takes for a number, and Python's JSON refuses."""
_FEW = 64
"""One row of so many may be read by itself within a block of columns."""
_LF, _CR, _QUOTE, _COMMA = b'\n\r",'
_TEXTS, _WHOLE, _FRACTIONS = pa.list_(pa.string()), pa.int64(), pa.float64()


class _Blocks:
    """The lines of a file in blocks, and one by one."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._ahead, self._at = b"", 0
        self.number = 0
        """How many lines were read."""

    def start(self) -> None:
        """Leaves out the byte order mark.

        Raises:
            ValueError: the file is UTF-16.
        """
        self._ahead = self._file.read(_BLOCK)
        if self._ahead.startswith(_UTF16):
            raise ValueError("its text is UTF-16, not UTF-8")
        self._ahead = self._ahead.removeprefix(_BOM)

    def read(self, *, quoted: bool = False) -> bytes:
        """Some whole lines; nothing at the end.

        Args:
            quoted: a line does not end within double quotes, if the block has such an end of a line.
        """
        ahead = self._ahead[self._at :]
        if len(ahead) < _BLOCK:
            ahead += self._file.read(_BLOCK)
        end = ahead.rfind(b"\n") + 1
        if quoted and end:
            end = _end_outside_quotes(ahead, end) or end
        if not end:
            ahead += self._file.readline()
            end = len(ahead)
        self._ahead, self._at = ahead, end
        block = ahead[:end]
        self.number += count_lines(block)
        return block

    def lines(self, block: bytes) -> Iterator[str]:
        """The lines of a block that was read last, then those behind it."""
        self._ahead, self._at = block + self._ahead[self._at :], 0
        self.number -= count_lines(block)
        while line := self._line():
            yield line.decode("utf-8", "surrogateescape")

    def _line(self) -> bytes:
        end = self._ahead.find(b"\n", self._at) + 1
        if not end:
            self._ahead, self._at = self._ahead[self._at :] + self._file.readline(), 0
            end = len(self._ahead)
        line, self._at = self._ahead[self._at : end], end
        self.number += line != b""
        return line


def count_lines(block: bytes) -> int:
    """How many lines some whole lines are; the last one may have no end."""
    return _count(block, _LF) + (block != b"" and not block.endswith(b"\n"))


def _count(block: bytes, byte: int) -> int:
    """How often a byte is there, in a tenth of the time of `bytes.count` where it is often."""
    return int(np.count_nonzero(np.frombuffer(block, np.uint8) == byte))


def _has_pair(block: bytes, pair: bytes) -> bool:
    """Whether two bytes follow each other; much faster than `in` where the first is often."""
    if pair[:1] not in block:
        return False
    data = np.frombuffer(block, np.uint8)
    return bool((data[np.flatnonzero(data[:-1] == pair[0]) + 1] == pair[1]).any())


def _end_outside_quotes(data: bytes, end: int) -> int:
    """The last end of a line, not behind `end`, with an even number of quotes before it; 0 if there is none."""
    quotes = _count(data[:end], _QUOTE)
    while end and quotes % 2:
        before = data.rfind(b"\n", 0, end - 1) + 1
        quotes -= data.count(b'"', before, end)
        end = before
    return end


def text_chunks(kind: str, file: IO[bytes], wanted: Sequence[str]) -> Iterator[Chunk]:
    """The rows of a table of text, in order; the columns of a batch are those `wanted` that the table has.

    Raises:
        ValueError: the file is UTF-16, or names two columns alike.
        OSError, EOFError: it is damaged.
    """
    blocks = _Blocks(file)
    blocks.start()
    if kind == "jsonl":
        return _json_chunks(blocks, wanted)
    return _txt_chunks(blocks) if kind == "txt" else _fields_chunks(blocks, kind, wanted)


def _txt_chunks(blocks: _Blocks) -> Iterator[Chunk]:
    while block := blocks.read():
        if block.isascii() and not _has_control(block):
            lines = pc.ascii_trim_whitespace(_lines_of(block))  # pyright: ignore[reportAttributeAccessIssue]
            lines = lines.filter(pc.not_equal(lines, ""))  # pyright: ignore[reportAttributeAccessIssue]
            yield pa.RecordBatch.from_arrays([lines], names=["url"])
        else:
            lines = block.decode("utf-8", "surrogateescape").split("\n")
            yield [{"url": line.strip()} for line in lines if line.strip()]


def _json_chunks(blocks: _Blocks, wanted: Sequence[str]) -> Iterator[Chunk]:
    kinds: dict[str, pa.DataType] = dict.fromkeys(wanted, pa.string())
    plain = all("." not in name for name in wanted)
    while block := blocks.read():
        batch = _json_batch(block, kinds) if plain and _is_regular(block) else None
        own = None if batch is None else _own_rows(block, batch, kinds)
        if batch is not None and own is not None:
            yield from _around(batch, own)
            continue
        count = count_lines(block)
        yield list(json_records(islice(blocks.lines(block), count), blocks.number - count + 1))


def _json_batch(block: bytes, kinds: dict[str, pa.DataType]) -> pa.RecordBatch | None:
    """A block of objects, one in each line; None if it is not regular.

    Args:
        kinds: the columns to read, and of which type each was in the last block: text, a list of texts, whole numbers
            or fractions.
    """
    if (_has_pair(block, b"Na") or _has_pair(block, b"In")) and _NO_NUMBER.search(block):
        return None
    count = _count_objects(block)
    for _ in range(4 * len(kinds) + 1):
        try:
            batch = _json_columns(block, kinds)
            if batch is None or batch.num_rows != count:
                return None
            if _has_pair(block, b"\\u"):  # half a surrogate pair; the block itself is UTF-8
                batch.validate(full=True)
            return batch
        except pa.ArrowInvalid as error:
            found = re.search(r"Column\(/(.+)\) changed from \w+ to (string|array|number) in row", str(error))
            if found is None and "to int64" in str(error):
                name, kind = _not_whole(block, kinds), _FRACTIONS
            else:
                name = None if found is None else found[1]
                kind = None if found is None else {"string": pa.string(), "array": _TEXTS, "number": _WHOLE}[found[2]]
            if name is None or kind is None or kinds.get(name, kind) == kind:
                return None
            kinds[name] = kind
    return None


def _json_columns(block: bytes, kinds: Mapping[str, pa.DataType]) -> pa.RecordBatch | None:
    """The columns of some lines; None if these are blank.

    Raises:
        pa.ArrowInvalid: a line is no object, or a column is of another type.
    """
    options = pyarrow.json.ParseOptions(pa.schema(list(kinds.items())), unexpected_field_behavior="ignore")
    reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    table = pyarrow.json.read_json(pa.BufferReader(block), reading, options)
    found = table.to_batches()
    return None if not table.num_rows else found[0] if len(found) == 1 else table.combine_chunks().to_batches()[0]


def _not_whole(block: bytes, kinds: Mapping[str, pa.DataType]) -> str | None:
    """The first column of whole numbers that has others; None if there is none."""
    for name, kind in kinds.items():
        if kind == _WHOLE:
            try:
                _json_columns(block, {name: kind})
            except pa.ArrowInvalid:
                return name
    return None


def _own_rows(block: bytes, batch: pa.RecordBatch, kinds: dict[str, pa.DataType]) -> dict[int, Record] | None:
    """The records with a whole number such as `5`, which is no float in Python's JSON, in a column of fractions, by
    place; None if these are many, and then it is taken for a column of whole numbers in the next block."""
    lines: list[bytes] = []
    own: dict[int, Record] = {}
    for name, kind in kinds.items():
        if kind != _FRACTIONS:
            continue
        values = pc.fill_null(batch.column(name), 0.5).to_numpy(zero_copy_only=False)  # pyright: ignore[reportAttributeAccessIssue]
        places = np.flatnonzero(values == np.floor(values))
        lines = lines or [line for line in block.split(b"\n") if line.rstrip(b"\r")]
        for place in map(int, places):
            record = own.get(place) or json.loads(lines[place])
            if isinstance(record.get(name), int):
                own[place] = record
                if len(own) * _FEW > batch.num_rows:
                    kinds[name] = _WHOLE
                    return None
    return own


def _around(batch: pa.RecordBatch, own: Mapping[int, Record]) -> Iterator[Chunk]:
    """A batch, with records in place of some of its rows."""
    begin = 0
    for place in [*sorted(own), batch.num_rows]:
        if place > begin:
            yield batch.slice(begin, place - begin)
        if place in own:
            yield [own[place]]
        begin = place + 1


def _count_objects(block: bytes) -> int:
    """How many lines of a regular block are not blank; -1 if one of them does not begin and end with a bracket."""
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == _LF)
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(data))
    starts = np.concatenate(([0], ends[:-1] + 1))
    ends = ends - ((ends > starts) & (data[ends - 1] == _CR))
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not (np.all(data[starts] == ord("{")) and np.all(data[ends - 1] == ord("}"))):
        return -1
    for place in np.flatnonzero(ends - starts > _LONG_LINE):
        line = block[starts[place] : ends[place]]
        if line.count(b"{") + line.count(b"[") > _MOST_BRACKETS or _MANY_DIGITS.search(line):
            return -1
    return len(starts)


def _fields_chunks(blocks: _Blocks, kind: str, wanted: Sequence[str]) -> Iterator[Chunk]:
    is_csv = kind == "csv"
    names = _head(blocks, is_csv=is_csv)
    if isinstance(names, InvalidLine):
        yield [names]
        return
    check_head(names)
    places = {name: names.index(name) for name in top_levels(wanted, names)}
    while block := blocks.read(quoted=is_csv):
        batch = _fields_batch(block, len(names), places, is_csv=is_csv) if len(names) > 1 else None
        yield _fields_records(blocks, block, names, is_csv=is_csv) if batch is None else batch


def _head(blocks: _Blocks, *, is_csv: bool) -> list[str] | InvalidLine:
    """The names in the first record, behind which reading goes on."""
    lines = blocks.lines(b"")
    if not is_csv:
        return next(tsv_fields(lines), (0, []))[1]
    return next(csv_fields(Pushback(lines)), (0, []))[1]


def _fields_batch(block: bytes, width: int, places: dict[str, int], *, is_csv: bool) -> pa.RecordBatch | None:
    """A block of lines of `width` fields each; None if it is not regular."""
    if not _is_regular(block) or (is_csv and not _is_quoted_regularly(block)):
        return None
    columns = [str(place) for place in range(width)]
    used = list(dict.fromkeys(columns[place] for place in places.values())) or columns[:1]
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(block),
            pyarrow.csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=columns),
            pyarrow.csv.ParseOptions(
                delimiter="," if is_csv else "\t", quote_char='"' if is_csv else False, newlines_in_values=is_csv
            ),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(used, pa.string()), include_columns=used, strings_can_be_null=False
            ),
        ).combine_chunks()
    except pa.ArrowInvalid:
        return None
    arrays = [table.column(columns[place]).combine_chunks() for place in places.values()]
    batch = table.to_batches()[0] if table.num_rows else None
    if batch is None:
        return None
    return pa.RecordBatch.from_arrays(arrays or [batch.column(0)], names=list(places) or [""])


def _fields_records(blocks: _Blocks, block: bytes, names: Sequence[str], *, is_csv: bool) -> list[Record]:
    """The records of a block that is not regular; in csv also the lines behind it that its last one goes on in."""
    last = blocks.number
    lines = blocks.lines(block)
    if not is_csv:
        count = count_lines(block)
        return list(named(tsv_fields(islice(lines, count), last - count + 1), names))
    pushback = Pushback(lines, last - count_lines(block))
    found: list[Record] = []
    for fields in csv_fields(pushback):
        found += named(iter([fields]), names)
        if pushback.number >= last and not pushback.is_ahead:
            break
    return found


def _is_regular(block: bytes) -> bool:
    if _has_control(block):
        return False
    try:
        return block.isascii() or bool(block.decode()) or True
    except UnicodeDecodeError:
        return False


def _has_control(block: bytes) -> bool:
    """Whether there are control characters other than tabs and ends of lines, or a lone carriage return."""
    data = np.frombuffer(block, np.uint8)
    are_low = data < 32
    if np.count_nonzero(are_low) == _count(block, _LF):
        return False
    few = data[are_low]
    return bool(_CONTROL[few].any()) or (b"\r" in block and _count(block, _CR) != block.count(b"\r\n"))


def _is_quoted_regularly(block: bytes) -> bool:
    """Whether all quotes are around whole cells, or doubled in such a cell."""
    data = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(data == _QUOTE)
    if len(quotes) % 2:
        return False
    opening, closing = quotes[0::2], quotes[1::2]
    before = np.where(opening > 0, data[opening - 1], _LF)
    behind = np.where(closing + 1 < len(data), data[np.minimum(closing + 1, len(data) - 1)], _LF)
    doubled = np.zeros(len(opening), bool)
    doubled[1:] = opening[1:] == closing[:-1] + 1
    opens = (before == _COMMA) | (before == _LF) | doubled
    closes = (behind == _COMMA) | (behind == _LF) | (behind == _CR) | (behind == _QUOTE)
    return bool(opens.all() and closes.all())


def _lines_of(block: bytes) -> pa.Array:
    """The lines of an ASCII text, with their ends."""
    data = np.frombuffer(block, np.uint8)
    offsets = np.concatenate(([0], np.flatnonzero(data == _LF) + 1))
    offsets = offsets if offsets[-1] == len(block) else np.append(offsets, len(block))
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(block)]
    return pa.Array.from_buffers(pa.string(), len(offsets) - 1, buffers)
