"""Fingerprints: equal for equal meaning, different for different, with differences people can read."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.fingerprint import canonical_json, differences, digest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def test_a_digest_is_the_sha256_of_the_canonical_json() -> None:
    value = {"b": [1, None, True], "a": "é"}
    assert canonical_json(value) == '{"a":"é","b":[1,null,true]}'
    assert digest(value) == hashlib.sha256('{"a":"é","b":[1,null,true]}'.encode()).hexdigest()
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_the_order_of_keys_does_not_matter_and_that_of_lists_does() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest([1, 2]) != digest([2, 1])


@pytest.mark.parametrize(
    ("a", "b"), [(1, "1"), (None, "null"), (0, False), ([], {}), ("", None), ({"a": None}, {}), ([[1], 2], [1, [2]])]
)
def test_different_values_have_different_digests(a: object, b: object) -> None:
    assert digest(a) != digest(b)


@settings(deadline=None, max_examples=50)
@given(JSON)
def test_a_value_that_went_through_json_keeps_its_digest(value: object) -> None:
    assert digest(json.loads(json.dumps(value))) == digest(value)
    assert differences(value, json.loads(canonical_json(value))) == []


@settings(deadline=None, max_examples=50)
@given(JSON, JSON)
def test_there_are_differences_exactly_where_digests_differ(a: object, b: object) -> None:
    assert bool(differences(a, b)) == (digest(a) != digest(b))


def test_text_that_is_not_unicode_has_a_digest() -> None:
    assert digest("caf\udce9") != digest("caf")


def test_tuples_count_as_lists() -> None:
    assert digest((1, (2,))) == digest([1, [2]])
    assert differences({"a": (1, 2)}, {"a": [1, 2]}) == []


def test_groups_in_lists_are_told_by_number() -> None:
    old = {"stages": [{"a": 1, "b": {"c": 2}}, {"a": 3}]}
    assert differences(old, {"stages": [{"a": 1, "b": {"c": 5}}, {"a": 3}]}) == ["stages.0.b.c: 2 -> 5"]
    assert differences(old, {"stages": [{"a": 3}]}) == [
        "stages.0.a: 1 -> 3",
        'stages.0.b: {"c":2} -> (absent)',
        'stages.1: {"a":3} -> (absent)',
    ]
    assert differences({"text": "a" * 500}, {"text": "b"}) == [f"text: {'a' * 200}... -> b"]


def test_each_leaf_that_differs_has_a_line() -> None:
    old = {"size": 64, "encoder": {"name": "t5", "tokens": 128, "hash": "abc"}, "gone": [1]}
    new = {"size": 256, "encoder": {"name": "t5", "tokens": 64, "hash": "abd"}, "new": None}
    assert differences(old, new, "images") == [
        "images.encoder.hash: abc -> abd",
        "images.encoder.tokens: 128 -> 64",
        "images.gone: [1] -> (absent)",
        "images.new: (absent) -> null",
        "images.size: 64 -> 256",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ({"a": 1}, {"a": {"b": 1}}, 'a: 1 -> {"b":1}'),
        ({"a": "x"}, {"a": ["x"]}, 'a: x -> ["x"]'),
        ({"a": 1}, {"a": True}, "a: 1 -> true"),
        ({"a": 1}, {"a": 1.0}, "a: 1 -> 1.0"),
    ],
)
def test_a_change_of_type_is_a_difference(old: object, new: object, line: str) -> None:
    assert differences(old, new) == [line]
