"""Text tables in blocks of columns: the same rows as record by record, whatever is in them."""

import io
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest

from stages.lines import stream_lines
from stages.sources.records import regular
from stages.sources.records.cells import InvalidLine
from stages.sources.records.parquet import to_records
from stages.sources.records.text import csv_records, json_records, tsv_records

PARSERS = {"csv": csv_records, "tsv": tsv_records, "jsonl": json_records}
CSV = [
    b"u,red\n",
    b'u,"a, b"\n',
    b'"u","say ""hi"""\r\n',
    b'u,"two\nlines"\n',
    b"\n",
    b"u\n",
    b"u,c,\n",
    b"u,c,d\n",
    b'u,a "word"\n',
    b'u,"a"b\n',
    b' "u",c\n',
    b"u,caf\xc3\xa9\n",
    b"u,\xff\n",
    b"u,a\rb\n",
    b"u,\x00\n",
    b"u,\x0b\n",
    b"   \n",
    b'"",""\n',
    b"u,NULL\n",
    b'u,"open\n',
]
JSONL = [
    b'{"url": "u", "caption": "c"}\n',
    b'{"url": "u", "caption": ["a", "b"]}\r\n',
    b'{"url": "u", "caption": null, "w": [{"x": 1}]}\n',
    b'{"url": 7}\n',
    b'{"url": 1.5}\n',
    b'{"url": "u"} {"url": "v"}\n',
    b'{"url": "u", "url": "v"}\n',
    b'{"url": "\\ud83d\\ude00", "caption": "\\u0000"}\n',
    b'{"url": "\\ud83d"}\n',
    b'{"url": "u", "w": Inf}\n',
    b'{"url": "u", "w": [1, -NaN]}\n',
    b'{"url":\n',
    b'"u"}\n',
    b"[1]\n",
    b" \n",
    b'{"url": "u", "w": ' + b"1" * 5000 + b"}\n",
    b'{"url": "u", "w": ' + b"[" * 500 + b"]" * 500 + b"}\n",
    b'{"url": "\xff"}\n',
    b'{"url": "a\tb"}\n',
]
LINES = {"csv": CSV, "tsv": [line.replace(b",", b"\t") for line in CSV], "jsonl": JSONL}
HEADS = {"csv": b"url,caption\n", "tsv": b"url\tcaption\n", "jsonl": b""}


def in_columns(kind: str, data: bytes, wanted: list[str]) -> Iterator[dict[str, Any]]:
    for chunk in regular.text_chunks(kind, io.BytesIO(data), wanted):
        yield from to_records(chunk)


def plain(record: dict[str, Any]) -> object:
    """A record without what differs by design: absent columns are NULL."""
    if isinstance(record, InvalidLine):
        return ("invalid", record.reason, record.detail)
    return (record.get("url"), record.get("caption"))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_rows_in_blocks_are_those_of_the_parsers_whatever_the_lines_hold(kind: str) -> None:
    with mock.patch.object(regular, "_BLOCK", 64):
        for seed in range(60):
            dice = random.Random(seed)
            lines = dice.choices([*LINES[kind], *LINES[kind][:3] * 6], k=dice.randrange(1, 30))
            data = (b"\xef\xbb\xbf" if seed % 5 == 0 else b"") + HEADS[kind] + b"".join(lines)
            data = data.removesuffix(b"\n") if seed % 3 == 0 else data
            expected = [plain(record) for record in PARSERS[kind](stream_lines(io.BytesIO(data)))]
            assert [plain(record) for record in in_columns(kind, data, ["url", "caption"])] == expected, data


@pytest.mark.parametrize(("kind", "row"), [("csv", b'u,"a, ""b"""\n'), ("tsv", b'u\t"c\n'), ("jsonl", JSONL[0])])
def test_regular_tables_are_read_as_columns_alone(kind: str, row: bytes) -> None:
    chunks = list(regular.text_chunks(kind, io.BytesIO(HEADS[kind] + 100 * row), ["url", "caption"]))
    assert all(isinstance(chunk, pa.RecordBatch) for chunk in chunks)
    assert sum(len(chunk) for chunk in chunks) == 100


def numbers(data: bytes) -> list[object]:
    """The numbers of lines with their types."""
    return [repr(record.get("w")) for record in in_columns("jsonl", data, ["w"])]


def test_numbers_in_json_keep_value_and_type_whatever_kinds_are_mixed() -> None:
    cells = ["5", "5.0", "1.25", "-0", "-0.0", "1e3", "1e400", "9007199254740993", "9007199254740993.0", "null"]
    cells += ["12345678901234567890123", '"x"', "true", "NaN", "-Infinity", "Inf", "0.1e-320", "1E5"]
    for seed in range(80):
        dice = random.Random(seed)
        some = dice.sample(cells, dice.randrange(1, 4)) + ["0.5"] * (seed % 2 * 40)
        data = b"".join(b'{"w": %s}\n' % dice.choice(some).encode() for _ in range(300))
        expected = [repr(record.get("w")) for record in json_records(stream_lines(io.BytesIO(data)))]
        with mock.patch.object(regular, "_BLOCK", 1500):
            assert numbers(data) == expected, some


@pytest.mark.parametrize(
    ("cells", "by_itself"), [(["1.5", "2.0"], 0), (["1.5", "-3e5"], 0), (["1.5"] * 99 + ["2"], 3)]
)
def test_fractions_in_json_are_read_as_columns_and_whole_numbers_among_them_by_themselves(
    cells: list[str], by_itself: int
) -> None:
    data = b"".join(b'{"w": %s, "n": 7}\n' % cell.encode() for cell in cells * (300 // len(cells)))
    chunks = list(regular.text_chunks("jsonl", io.BytesIO(data), ["n", "w"]))
    assert sum(len(chunk) for chunk in chunks if isinstance(chunk, list)) == by_itself
    batches = [chunk for chunk in chunks if not isinstance(chunk, list)]
    assert {str(kind) for batch in batches for kind in batch.schema.types} == {"int64", "double"}


def test_one_irregular_line_costs_only_its_block_the_columns() -> None:
    data = b"url,caption\n" + 200 * b"u,c\n" + b'u,a "word"\n' + 200 * b"u,c\n"
    with mock.patch.object(regular, "_BLOCK", 64):
        chunks = list(regular.text_chunks("csv", io.BytesIO(data), ["url"]))
    assert sum(isinstance(chunk, list) for chunk in chunks) == 1
    assert sum(map(len, chunks)) == 401


def test_lines_of_txt_are_stripped_and_blank_ones_are_no_rows() -> None:
    data = " u\r\n\n\tv \nw\u3000\n\u00e9\n".encode()
    with mock.patch.object(regular, "_BLOCK", 6):
        assert [row["url"] for row in in_columns("txt", data, ["url"])] == ["u", "v", "w", "\u00e9"]


def test_utf16_is_refused_and_a_mark_of_utf8_left_out() -> None:
    with pytest.raises(ValueError, match="UTF-16"):
        list(in_columns("csv", "url,caption\nu,c\n".encode("utf-16"), ["url"]))
    assert list(in_columns("csv", b"\xef\xbb\xbfurl,caption\nu,c\n", ["url"])) == [{"url": "u"}]
