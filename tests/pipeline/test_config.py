"""Configurations: YAML files and KEY=VALUE overrides, and errors that say path, value and remedy."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from pipeline.config import Config, dump_yaml, load_config, read_yaml
from pipeline.errors import ConfigError


class Item(Config):
    name: str
    """Its name."""
    size_px: int = Field(default=8, ge=1)
    """Its size."""


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius_px: float = 1.5
    """Half the width."""


class Square(Config):
    kind: Literal["square"] = "square"
    side_px: int = 3
    """The width."""


class Inner(Config):
    flag: bool = False
    """On or off."""
    words: tuple[str, ...] = ("a", "b")
    """Some words."""


class Example(Config):
    count: int = Field(default=1, ge=0)
    """How many."""
    label: str | None = None
    """A text, or null."""
    shape: Annotated[Circle | Square, Field(discriminator="kind")] = Circle()
    """One of two."""
    items: tuple[Item, ...] = Field(default=(Item(name="first"), Item(name="second")), min_length=1)
    """A list with a default."""
    inner: Inner = Inner()
    """A group."""
    extra: Inner | None = None
    """A group, or null."""


def load(*overrides: str, yaml: Path | None = None) -> Example:
    return load_config(Example, yaml, overrides)


def test_without_a_file_the_defaults_hold() -> None:
    assert load() == Example()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("count=3", Example(count=3)),
        (" count =3", Example(count=3)),
        ("label=text", Example(label="text")),
        ("label=a=b", Example(label="a=b")),
        ("label='007'", Example(label="007")),
        ("label=null", Example(label=None)),
        ("label=", Example(label=None)),
        ("inner.flag=true", Example(inner=Inner(flag=True))),
        ("inner.words=[x, 'y, z']", Example(inner=Inner(words=("x", "y, z")))),
        ("inner={flag: true}", Example(inner=Inner(flag=True))),
        ("shape.radius_px=2", Example(shape=Circle(radius_px=2.0))),
        ("shape.kind=square", Example(shape=Square())),
        ("items=[{name: x}]", Example(items=(Item(name="x"),))),
        ("items.1.size_px=9", Example(items=(Item(name="first"), Item(name="second", size_px=9)))),
        ("items+=[{name: x}]", Example(items=(Item(name="first"), Item(name="second"), Item(name="x")))),
        ("items+={name: x}", Example(items=(Item(name="first"), Item(name="second"), Item(name="x")))),
        ("inner.words += x", Example(inner=Inner(words=(*Inner().words, "x")))),
        ("items.0={name: x}", Example(items=(Item(name="x"), Item(name="second")))),
    ],
)
def test_an_override_sets_one_value(override: str, expected: Example) -> None:
    assert load(override) == expected


def test_overrides_add_up_and_the_last_one_holds() -> None:
    found = load("count=3", "inner.flag=true", "count=4", "shape.kind=square", "shape.side_px=5")
    assert found == Example(count=4, inner=Inner(flag=True), shape=Square(side_px=5))


def test_additions_add_up_over_a_file_that_has_a_part_of_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("inner: {flag: true}\nitems:\n- name: only\n")
    found = load("items+=[{name: x}]", "inner.words+=[y, z]", "items+=[{name: w}]", yaml=path)
    words = (*Inner().words, "y", "z")
    assert found == Example(
        inner=Inner(flag=True, words=words), items=(Item(name="only"), Item(name="x"), Item(name="w"))
    )


def test_overrides_go_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("count: 7\nlabel: from file\nitems:\n- name: only\nshape: {kind: square}\n")
    found = load("items.0.size_px=2", "label=mine", yaml=path)
    assert found == Example(count=7, label="mine", items=(Item(name="only", size_px=2),), shape=Square())


@pytest.mark.parametrize("text", ["", "# nothing\n", "null\n", "{}"])
def test_an_empty_file_holds_the_defaults(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert load(yaml=tmp_path / "c.yaml") == Example()


def test_what_is_dumped_loads_again(tmp_path: Path) -> None:
    config = load("count=5", "label='ünïcode: #1'", "shape.kind=square", "items.0.size_px=2", "inner.words=[]")
    (tmp_path / "c.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load(yaml=tmp_path / "c.yaml") == config
    assert dump_yaml(config).startswith("count: 5\nlabel: 'ünïcode: #1'\nshape:\n  kind: square\n")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("count", "override 'count': write KEY=VALUE, for example images.sizes_px='[64, 256]'"),
        ("=1", "override '=1': write KEY=VALUE"),
        ("", "override '': write KEY=VALUE"),
        ("a..b=1", "override 'a..b=1': write KEY=VALUE"),
        ("count=[1", "override 'count=[1': the value is not valid YAML"),
        ("items.2.size_px=1", "override 'items.2.size_px=1': items has items 0..1, got '2'"),
        ("items.0.name.x=1", "override 'items.0.name.x=1': items.0.name is a plain value, not a mapping"),
        ("cuont=1", "cuont: unknown key (got 1); did you mean 'count'?"),
        ("zzz=1", "zzz: unknown key (got 1); known keys: count, extra, inner, items, label, shape"),
        ("inner.flga=true", "inner.flga: unknown key (got True); did you mean 'flag'?"),
        ("items.0.sizepx=1", "items.0.sizepx: unknown key (got 1); did you mean 'size_px'?"),
        ("shape.radius=1", "shape.radius: unknown key (got 1); did you mean 'radius_px'?"),
        (
            "shape={kind: square, radius_px: 1}",
            "shape.radius_px: unknown key (got 1); known keys of shape.kind=square: kind, side_px",
        ),
        ("shape.kind=sqare", "shape.kind: there is none of this name (got 'sqare'); did you mean 'square'?"),
        ("shape.kind=9", "shape.kind: there is none of this name (got '9'); choose from circle, square"),
        ("items=[{size_px: 1}]", "items.0.name: needed, but not given; set it in the file or as items.0.name=VALUE"),
        ("count+=1", "override 'count+=1': count is no list (it is 1); use count=VALUE"),
        ("count=x", "count: input should be a valid integer, unable to parse string as an integer (got 'x')"),
        ("count=-1", "count: input should be greater than or equal to 0 (got -1)"),
        ("items.1.size_px=0", "items.1.size_px: input should be greater than or equal to 1 (got 0)"),
        ("inner.words=a", "inner.words: input should be a list (got 'a')"),
        ("items=3", "items: input should be a list (got 3)"),
        ("shape.side_px=a", "shape.side_px: unknown key (got 'a')"),
        ("extra.flga=1", "extra.flga: unknown key (got 1); did you mean 'flag'?"),
        ("extra.zzz=1", "extra.zzz: unknown key (got 1); known keys: flag, words"),
    ],
)
def test_a_wrong_override_says_path_value_and_remedy(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert says in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_each_problem_has_its_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load("count=-1", "inner.flga=1", "items.1.size_px=x")
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [
        "count",
        "items.1.size_px",
        "inner.flga",
    ]


def test_an_empty_list_is_not_blamed_for_its_bad_item() -> None:
    with pytest.raises(ConfigError) as caught:
        load("items=[{name: a, size_px: 0}]")
    assert str(caught.value) == "items.0.size_px: input should be greater than or equal to 1 (got 0)"
    with pytest.raises(ConfigError, match=r"^items: list should have at least 1 item after validation, not 0"):
        load("items=[]")


def test_a_long_value_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"^count: input should be a valid integer[^(]*$"):
        load(f"count={'x' * 500}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"- a\n- b\n", "must be a mapping of keys, got list"),
        (b"text", "must be a mapping of keys, got str"),
        (b"a: [1\n", "not valid YAML: while parsing a flow sequence"),
        (b"a: \xff", "not valid YAML: 'utf-8' codec can't decode"),
        (b"a: 2024-99-99\n", "not valid YAML: month must be in 1..12"),
        (b"!!python/object/apply:os.getcwd []", "not valid YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"config file {path}: {says}")


def test_two_numbers_with_a_colon_are_a_text_and_no_number_of_base_60(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("ratios: [3:2, 16:9, 1:30.5]\nwhole: 0x10\npart: 1.5e+3\nnone: .inf\n")
    assert read_yaml(tmp_path / "c.yaml") == {
        "ratios": ["3:2", "16:9", "1:30.5"],
        "whole": 16,
        "part": 1500.0,
        "none": float("inf"),
    }
    assert load("label=3:2").label == "3:2"


def test_keys_are_what_is_written_also_where_yaml_has_a_value_for_them(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("null: x.npy\n'null ': y\non: {yes: 1, ~: null}\n8: b\n")
    expected = {"null": "x.npy", "null ": "y", "on": {"yes": 1, "~": None}, 8: "b"}
    assert read_yaml(tmp_path / "c.yaml") == expected


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml: cannot be read \(No such file or directory\); check the path"):
        read_yaml(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read [(]Is a directory[)]"):
        read_yaml(tmp_path)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Example().count = 3


def test_the_texts_under_the_fields_are_in_the_schema() -> None:
    schema = Example.model_json_schema()
    assert schema["properties"]["count"] == {
        "default": 1,
        "description": "How many.",
        "minimum": 0,
        "title": "Count",
        "type": "integer",
    }
    assert schema["additionalProperties"] is False


def test_a_wrong_default_is_found_at_once() -> None:
    class Wrong(Config):
        count: int = Field(default=-1, ge=0)

    with pytest.raises(ConfigError, match=r"count: input should be greater than or equal to 0 \(got -1\)"):
        load_config(Wrong)
