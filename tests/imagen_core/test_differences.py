"""Differences of JSON values, by field."""

from imagen_core.differences import changed_fields, differing


def test_changed_fields_are_named_with_both_values() -> None:
    assert changed_fields({"a": 1, "b": {"c": [1]}}, {"b": {"c": [2]}, "d": None}) == [
        "a: 1 -> (absent)",
        "b.c: [1] -> [2]",
        "d: (absent) -> null",
    ]


def test_of_several_values_a_field_is_named_if_one_has_another_value() -> None:
    values = [{"a": 1, "b": "x"}, {"a": 1, "b": "x"}, {"a": 1, "c": {"d": True}}]
    assert differing(values) == [("b", ('"x"', '"x"', None)), ("c.d", (None, None, "true"))]
    assert differing(values[:2]) == []
