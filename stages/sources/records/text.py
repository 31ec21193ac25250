"""Records of text tables. A line that cannot be parsed is a record of its own, and takes no other line with it."""

import csv
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from stages.sources.records.cells import InvalidLine

_MAX_LINES = 1000
"""Of one record. A quote that is never closed would read to the end of the file."""

Record = dict[str, Any]


def json_records(lines: Iterable[str]) -> Iterator[Record]:
    """One object per line; blank lines are no records."""
    for number, line in enumerate(lines, start=1):
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
    fields = ((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(lines, start=1))
    yield from _named(fields)


def csv_records(lines: Iterable[str]) -> Iterator[Record]:
    """Fields as in RFC 4180, the first line their names. Cells in quotes may have line ends."""
    yield from _named(_csv_fields(_Pushback(lines)))


def _named(lines: Iterator[tuple[int, list[str] | InvalidLine]]) -> Iterator[Record]:
    """The records behind the line of names; a line with other fields than names is invalid.

    Blank lines are no records, and empty fields at the end too many are ignored.

    Raises:
        ValueError: two columns have the same name.
    """
    _, names = next(lines, (0, []))
    if isinstance(names, InvalidLine):
        yield names
        return
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"its first line names {twice!r} twice")
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


class _Pushback(Iterator[str]):
    """Lines of which the last ones can be read again."""

    def __init__(self, lines: Iterable[str]):
        self._lines = iter(lines)
        self._again: deque[str] = deque()
        self.number = 0
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

    def keep_first(self) -> int:
        """Lets all lines of this record but the first be read again; the number of the first."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1
        return self.number


def _csv_fields(lines: _Pushback) -> Iterator[tuple[int, list[str] | InvalidLine]]:
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
