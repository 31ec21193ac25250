"""Cells are texts, keys and images; what is none of these is a drop with its column and type."""

import base64
import datetime
import math
from uuid import UUID

import pytest

from stages.sources.records.cells import BadCell, captions_of, image_of, key_of, text_of, value_at

PNG = b"\x89PNG\r\n\x1a\n and more"


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        (b"a red square", ["a red square"]),
        ("caf\u00e9".encode(), ["caf\u00e9"]),
        (b"caf\xe9", ["caf\udce9"]),
        ([b"a", "b", None, math.nan], ["a", "b"]),
        ([["a", "b"], [], ["c"]], ["a", "b", "c"]),
        (math.nan, []),
    ],
)
def test_captions_are_text_or_bytes_or_lists_of_them(value: object, captions: list[str]) -> None:
    assert captions_of({"c": value}, "c") == captions


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (3, "a number"),
        (1.5, "a number"),
        (True, "a boolean"),
        ({"raw": "a"}, "a struct"),
        ([{"raw": "a"}], "a struct"),
        (("k", "v"), "a tuple"),
        (datetime.date(2026, 1, 1), "a date"),
    ],
)
def test_a_caption_that_is_no_text_is_refused_by_column_and_type(value: object, what: str) -> None:
    with pytest.raises(BadCell) as refused:
        captions_of({"c": value}, "c")
    assert (refused.value.reason, refused.value.detail) == ("unsupported_type", f"'c' holds {what}, not text")


def test_a_path_leads_into_structs_and_lists_of_structs() -> None:
    record = {"sentences": [{"raw": "a"}, {"raw": None}, {"raw": "b"}], "meta": {"de": {"text": "c"}}, "x.y": "d"}
    assert captions_of(record, "sentences.raw") == ["a", "b"]
    assert captions_of(record, "meta.de.text") == ["c"]
    assert captions_of(record, "x.y") == ["d"], "a name may have dots"
    assert value_at(record, "meta.en.text") is None


def test_a_path_into_a_text_is_refused() -> None:
    with pytest.raises(BadCell, match="holds text, not a field 'raw'"):
        captions_of({"c": "a"}, "c.raw")


def test_one_text_is_no_list() -> None:
    with pytest.raises(BadCell, match="'u' holds a list, not text"):
        text_of({"u": ["a"]}, "u")


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("a", "a"),
        (b"a", "a"),
        (7, "7"),
        (7.0, "7.0"),
        (math.nan, None),
        (None, None),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
)
def test_a_key_is_text_or_a_number(value: object, key: str | None) -> None:
    assert key_of({"k": value}, "k") == key


@pytest.mark.parametrize("value", [True, {"a": 1}, [1]])
def test_other_keys_are_refused(value: object) -> None:
    with pytest.raises(BadCell, match="unsupported_type"):
        key_of({"k": value}, "k")


@pytest.mark.parametrize(
    "value",
    [
        PNG,
        base64.b64encode(PNG).decode(),
        "data:image/png;base64," + base64.encodebytes(PNG).decode(),
        list(PNG),
        {"bytes": PNG, "path": "a.png"},
    ],
)
def test_an_image_is_bytes_base64_a_list_of_bytes_or_a_struct(value: object) -> None:
    assert image_of({"i": value}, "i") == (PNG, None)


def test_an_image_without_bytes_is_its_path_or_nothing() -> None:
    assert image_of({"i": {"bytes": None, "path": "a.png"}}, "i") == (None, "a.png")
    assert image_of({"i": {"bytes": None, "path": ""}}, "i") == (None, None)
    assert image_of({"i": None}, "i") == (None, None)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("not base64!", "bad_base64"),
        ("\u00e4\u00e4", "bad_base64"),
        (3, "unsupported_type"),
        ([256], "unsupported_type"),
        ([[1, 2]], "unsupported_type"),
    ],
)
def test_other_images_are_refused(value: object, reason: str) -> None:
    with pytest.raises(BadCell, match=reason):
        image_of({"i": value}, "i")
