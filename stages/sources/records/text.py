"""Records of text tables. A line that cannot be parsed is a record of its own, and takes no other line with it."""

import csv
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from stages.sources.records.cells import InvalidLine

_MAX_LINES = 1000
"""Of one record. A quote that is never closed would read to the end of the file."""

Record = dict[str, Any]
Fields = tuple[int, list[str] | InvalidLine]
"""Number and fields of a line."""


def json_records(lines: Iterable[str], start: int = 1) -> Iterator[Record]:
    """One object per line, the first of number `start`; blank lines are no records."""
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield InvalidLine(f"line {number} is not JSON: {error.msg}, column {error.pos + 1}")
            continue
        except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
            yield InvalidLine(f"line {number} is not JSON: {error}")
            continue
        yield row if isinstance(row, dict) else InvalidLine(f"line {number} is no JSON object")


def tsv_records(lines: Iterable[str]) -> Iterator[Record]:
    """Fields between tabs, the first line their names. Quotes are literal, as in the IANA registration."""
    yield from _with_head(tsv_fields(lines))


def csv_records(lines: Iterable[str]) -> Iterator[Record]:
    """Fields as in RFC 4180, the first line their names. Cells in quotes may have line ends."""
    yield from _with_head(csv_fields(Pushback(lines)))


def tsv_fields(lines: Iterable[str], start: int = 1) -> Iterator[Fields]:
    """The fields of lines, each with its number."""
    return ((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(lines, start))


def _with_head(lines: Iterator[Fields]) -> Iterator[Record]:
    _, names = next(lines, (0, []))
    if isinstance(names, InvalidLine):
        yield names
        return
    check_head(names)
    yield from named(lines, names)


def check_head(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: two columns have the same name.
    """
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"its first line names {twice!r} twice")


def named(lines: Iterator[Fields], names: Sequence[str]) -> Iterator[Record]:
    """The records of lines; a line with other fields than names is invalid.

    Blank lines are no records, and empty fields at the end too many are ignored.
    """
    if len(names) == 1:  # a blank line cannot be told from an empty field
        lines = ((number, fields) for number, fields in lines if fields != [""])
    for number, fields in lines:
        if isinstance(fields, InvalidLine):
            yield fields
        elif len(fields) == len(names):
            yield dict(zip(names, fields, strict=True))
        elif not fields or (len(fields) == 1 and not fields[0].strip()):
            continue
        elif len(fields) < len(names) or any(fields[len(names) :]):
            yield InvalidLine(f"line {number} has {len(fields)} fields for {len(names)} columns")
        else:
            yield dict(zip(names, fields, strict=False))


class Pushback(Iterator[str]):
    """Lines of which the last ones can be read again."""

    def __init__(self, lines: Iterable[str], number: int = 0):
        self._lines = iter(lines)
        self._again: deque[str] = deque()
        self.number = number
        """Number of the last line that was read."""
        self.taken: list[str] = []
        """The lines of this record."""

    def __next__(self) -> str:
        if len(self.taken) == _MAX_LINES:
            raise csv.Error(f"a quote is not closed within {_MAX_LINES} lines")
        line = self._again.popleft() if self._again else next(self._lines)
        self.number += 1
        self.taken.append(line)
        return line

    @property
    def is_ahead(self) -> bool:
        """Whether there are lines that will be read again."""
        return bool(self._again)

    def keep_first(self) -> int:
        """Lets all lines of this record but the first be read again; the number of the first."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1
        return self.number


def csv_fields(lines: Pushback) -> Iterator[Fields]:
    """The fields of records, each with the number of its first line."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, strict=True)  # after an error it begins anew with the next line
    while True:
        lines.taken.clear()
        number = lines.number + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number = lines.keep_first()
            yield number, InvalidLine(f"line {number} is not CSV: {error}")
            continue
        yield number, fields
