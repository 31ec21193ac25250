"""Rows made of columns at once are byte for byte the canonical JSON of each row, so finished work is recognised."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.fingerprint import canonical_json
from stages.sources.records import row_text
from stages.sources.records.row_text import NotColumnar, RowTexts, list_text

TEXTS = ["plain", 'a "word"', "back\\slash", 'both \\" of', "".join(map(chr, range(33))), "caf\u00e9 \U0001f600", ""]


@pytest.mark.parametrize("repeat", [1, 40], ids=["most rows have escapes", "few rows have"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_are_escaped_as_json_does(kind: pa.DataType, repeat: int) -> None:
    values = TEXTS + ["none"] * (repeat - 1) * len(TEXTS)
    data = [value.encode() for value in values] if pa.types.is_binary(kind) else values
    column = pa.array(data, kind).slice(1)
    joined = row_text.join('"', row_text.escape(row_text.texts(column)), '"')
    assert joined.to_pylist() == [canonical_json(value) for value in values[1:]]


@pytest.mark.parametrize(
    "values", [["a", None, 'b "c"'], [["a", 'b "c"'], [], None, ["d"]]], ids=["a text each", "lists of texts"]
)
def test_captions_are_lists_and_null_is_an_empty_one(values: list[Any]) -> None:
    expected = [[] if v is None else v if isinstance(v, list) else [v] for v in values]
    found = row_text.join("", *row_text.captions_json(pa.array(values)))
    assert found.to_pylist() == [canonical_json(value) for value in expected]


@pytest.mark.parametrize(
    "column", [pa.array([1.5]), pa.array([b"\xff"]), pa.array([b"\xff"]).view(pa.string()), pa.array([[{"a": 1}]])]
)
def test_what_only_a_cell_can_tell_is_left_to_the_cells(column: pa.Array) -> None:
    with pytest.raises(NotColumnar):
        row_text.captions_json(column)


def test_a_list_with_null_is_left_to_the_cells() -> None:
    with pytest.raises(NotColumnar):
        row_text.captions_json(pa.array([["a", None]]))


def test_pieces_make_the_text_of_a_list() -> None:
    rows = [["a", 1], ["\udcff", None], ["c"]]
    texts = RowTexts.of(rows)
    text = list_text([texts.between(0, 1), texts.between(1, 3)])
    assert text.decode("utf-8", "surrogatepass") == canonical_json(rows)
    assert list_text([]) == b"[]"


def test_numbers_have_at_least_so_many_digits() -> None:
    assert row_text.numbers(np.arange(98, 102), 2).to_pylist() == ["98", "99", "100", "101"]
