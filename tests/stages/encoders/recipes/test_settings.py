"""The settings of recipes: how a caption becomes the input of a model, what is refused, and what is recorded."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter
from transformers import AutoTokenizer

from imagen_core.extensions import member_of
from pipeline.config import Config, load_config
from pipeline.errors import ConfigError
from stages.encoders.batches.model_input import ModelInput
from stages.encoders.identity import identity_changes
from stages.encoders.recipes.cleaning import clean
from stages.encoders.recipes.shipped import recipes
from stages.encoders.recipes.states import chosen_layers
from stages.encoders.recipes.template import RecipeReader
from stages.encoders.registry import AnyEncoder
from tests.commands import call
from tests.runs import REPOSITORY
from tests.stages.encoders.recipes.pipelines import write_tokenizer
from workflows.precompute_config import PrecomputeConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, "<s> $A")
    return folder


def config(**settings: Any) -> Any:
    return TypeAdapter(AnyEncoder).validate_python({"name": "text", "kind": "auto", "model": "m", **settings})


def read(folder: Path, caption: str, **settings: Any) -> tuple[str, ModelInput]:
    """The text of the tokens that the model reads for one caption, and its input."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (found,), _ = RecipeReader(config(**settings), tokenizer)([caption])
    return tokenizer.decode(found.ids), found


def test_a_template_stands_around_the_caption_and_its_rows_are_dropped_again(folder: Path) -> None:
    template = {"prefix": "See: ", "suffix": "."}
    text, found = read(folder, "a cat", template=template, drop_prefix="auto")
    assert (text, found.start, found.num_rows) == ("<s>See: a cat.", 6, 6)
    for drop, start in ((3, 3), ("prefix", 6)):
        assert read(folder, "a cat", template=template, drop_prefix=drop)[1].start == start
    _, kept = read(folder, "a cat", template=template, drop_prefix="prefix", keep_prefix=[1, 2])
    rows = np.arange(12, dtype=np.float32)[:, None]
    assert kept.kept(rows)[:, 0].tolist() == [0, 4, 5, 6, 7, 8, 9, 10, 11]


def test_a_chat_template_has_system_message_and_options(folder: Path) -> None:
    template = {"system": "Hi", "chat": {"enable_thinking": False}, "special_tokens": False}
    text, found = read(folder, "a cat", template=template, drop_prefix="system")
    system = "<|im_start|>system\nHi<|im_end|>\n"
    assert text == (f"{system}<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert found.start == len("Ssystem\nHiE\n")


@pytest.mark.parametrize(
    ("pads", "side", "text", "masked", "rows"),
    [
        ({"to": 8}, "right", "<s>abc<pad><pad><pad><pad>", (4, 8), 8),
        ({"add": 1}, "right", "<s>abc<pad>", (4, 5), 5),
        ({"add": 9}, "right", "<s>abc<pad><pad><pad><pad>", (4, 8), 8),
        ({"multiple_of": 3, "mode": "encoded"}, "left", "<pad><pad><s>abc", (0, 0), 6),
        ({"to": 8, "mode": "zeroed"}, "right", "<s>abc", (0, 0), 8),
        ({"to": 8, "mode": "encoded", "stored": False}, "right", "<s>abc<pad><pad><pad><pad>", (0, 0), 4),
    ],
)
def test_padding_is_what_the_recipe_says(
    folder: Path, pads: dict[str, Any], side: str, text: str, masked: tuple[int, int], rows: int
) -> None:
    found_text, found = read(folder, "abc", max_tokens=8, pads=pads, padding_side=side)
    assert (found_text, found.masked, found.num_rows) == (text, masked, rows)
    assert found.kept(np.ones((len(found.ids), 2), np.float32)).shape == (rows, 2)


def test_zeros_stand_behind_the_rows(folder: Path) -> None:
    _, found = read(folder, "abc", max_tokens=8, pads={"to": 6, "mode": "zeroed"} | {"to": 8})
    assert found.kept(np.ones((4, 1), np.float32))[:, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_text_behind_the_padding_is_never_cut_off(folder: Path) -> None:
    template = {"prefix": "See: ", "suffix_after_pads": "END"}
    text, found = read(folder, "a long caption", max_tokens=8, template=template, drop_prefix="prefix")
    assert (text, found.num_rows) == ("<s>See: a lonEND", 8)
    text, found = read(folder, "a", max_tokens=8, template=template, drop_prefix="prefix", pads={"to": 8})
    assert (text, found.masked) == ("<s>See: a<pad><pad><pad><pad>END", (7, 11))


def test_max_tokens_is_of_the_rows_or_of_the_caption(folder: Path) -> None:
    template = {"prefix": "See: ", "suffix": "."}
    text, found = read(folder, "abcdef", max_tokens=4, template=template, drop_prefix="prefix")
    assert (text, found.num_rows) == ("<s>See: abcd", 4)
    text, _ = read(folder, "abcdef", max_tokens=4, template=template, max_tokens_of="caption")
    assert text == "<s>See: abcd."
    reader = RecipeReader(config(max_tokens=8, template=template), AutoTokenizer.from_pretrained(folder))
    assert reader(["abcdef", "", "abc"])[1] == 2


@pytest.mark.parametrize(
    ("empty", "text"),
    [("encode", "<s>See: "), ("plain", "<s>"), ({"text": "?"}, "<s>See: ?"), ({"token": 4}, "<|im_end|>")],
)
def test_the_empty_caption_has_its_own_rule(folder: Path, empty: Any, text: str) -> None:
    assert read(folder, "", template={"prefix": "See: "}, empty=empty)[0] == text


def test_a_caption_of_which_nothing_is_left_has_no_rows(folder: Path) -> None:
    assert read(folder, "#", cleaning=["strip"])[1].num_rows == 2
    assert read(folder, " ", cleaning=["strip"], template={"prefix": "See: "}, pads={"to": 128})[1].num_rows == 0
    with pytest.raises(
        ConfigError, match=r"text\.empty: nothing is left of the empty caption once 1 rows are dropped"
    ):
        read(folder, "a", drop_prefix=1)


def test_cleaning_is_by_name_and_in_order() -> None:
    caption = '  The\n{"a": 1}  CAT &amp;amp; dog '
    assert clean(caption, []) == caption
    assert clean(caption, ["strip"]) == caption.strip()
    assert clean(caption, ["html", "lower", "whitespace"]) == 'the {"a": 1} cat & dog'


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("#1234 Blue Door & 50% off", "1234 blue door 50% off"),
        ("IMG_2041.JPG red-brick-house-on-hill", "red brick house on hill"),
        ("a cat (sitting) 1024x768", "a cat sitting"),
        ('"Quoted all"', "quoted all"),
        ("a 4K photo of B2B", "a 4k photo of"),
        ("U.S.A. flag", "u. s. a. flag"),
        ("AT&T", "att"),
        ("rock & roll", "rock roll"),
        ("日本 cat", "cat"),
        ("page 12 of 30", "of 30"),
        ("Download free vector image", "vector image"),
        ('it says "hello" there', 'it says "hello" there'),
    ],
)
def test_deepfloyds_cleaning_gives_what_its_pipelines_give(caption: str, cleaned: str) -> None:
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    assert clean(caption, ["deepfloyd"]) == cleaned


def test_layers_are_indices_or_slices() -> None:
    assert chosen_layers((0, -1, -2), 4, "e") == [0, 4, 3]
    assert chosen_layers(("1:",), 4, "e") == [1, 2, 3, 4]
    assert chosen_layers(("2:36:3", 36), 36, "e") == [*range(2, 36, 3), 36]
    for layer in (5, -6, "5:"):
        with pytest.raises(ConfigError, match=rf"e\.layers: {layer}: the model has 4 layers; give indices from 0"):
            chosen_layers((layer,), 4, "e")


# ---- tabs and line ends ----


@pytest.mark.parametrize("settings", [{"template": {"prefix": "See: "}}, {"layers": [1]}, {"cleaning": "strip"}])
def test_a_recipe_reads_a_caption_with_its_tabs_and_line_ends(folder: Path, settings: dict[str, Any]) -> None:
    caption = '{\n\t"subject": "a cat"\r\n}'
    text, _ = read(folder, caption, **settings)
    assert text.endswith(caption)
    assert read(folder, caption, template={"chat": {}})[0].count(f"user\n{caption}<|im_end|>") == 1


def test_without_a_recipe_they_are_spaces_as_they_were_to_earlier_versions(folder: Path) -> None:
    assert read(folder, "a\n\tcat\r\n!")[0] == "<s>a  cat  !"
    assert read(folder, "a\n\tcat\r\n!", recipe="mochi", kind="t5")[0] == "<s>a  cat  !"


def test_the_cleaning_of_a_recipe_decides_what_becomes_of_them(folder: Path) -> None:
    assert read(folder, "a\n\n cat", cleaning=["whitespace"])[0] == "<s>a cat"


# ---- refusals: one line with the key, the value and the remedy ----


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"template": {"prefix": "a {style} of "}}, "template.prefix: names the field {style}, which there is none"),
        ({"template": {"system": "x"}}, "template: system needs the model's chat template; add chat: {}"),
        ({"template": {"prefx": "x"}}, "template.prefx: unknown key (got 'x'); did you mean 'prefix'?"),
        ({"layers": "first"}, "layers: give indices, such as [9, 18, 27], or slices, such as \"1:\" (got 'first')"),
        ({"layers": []}, "layers: name at least one layer"),
        ({"layers": [1], "output": "penultimate"}, "layers and output: penultimate exclude each other"),
        ({"kind": "clip", "layers": [1]}, "layers and final_norm are not for kind: clip"),
        ({"final_norm": "no"}, "final_norm: give true, false or rms (got 'no')"),
        ({"pads": {"to": 64}}, "pads.to is 64, less than max_tokens (128); set max_tokens to it"),
        ({"pads": {"to": 128, "add": 1}}, "pads: give one of to, multiple_of and add"),
        ({"pads": {"to": 128}, "padding_side": "left"}, "padding_side is left, and masked padding on the left has"),
        ({"pads": {"to": 128, "stored": False}}, "pads: stored is false, and mode masked changes no row"),
        ({"drop_prefix": "system"}, "drop_prefix is system, but template.system is not set"),
        ({"drop_prefix": "auto"}, "drop_prefix is auto, but there is no template; leave it out"),
        ({"drop_prefix": -1}, "drop_prefix: give a number of tokens, auto, prefix or system (got -1)"),
        ({"keep_prefix": [1, 1]}, "keep_prefix needs drop_prefix; leave it out"),
        ({"cleaning": ["uper"]}, "cleaning.0: input should be"),
        ({"empty": "skip"}, "empty: give encode, plain, {text: ...} or {token: ...} (got 'skip')"),
        ({"recipe": "sanna"}, "there is no recipe 'sanna'; choose from auraflow, chroma"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(settings: dict[str, Any], says: str) -> None:
    encoder = {"name": "text", "kind": "auto", "model": "m", **settings}
    with pytest.raises(ConfigError) as error:
        load_config(PrecomputeConfig, {"encoders": [encoder]})
    assert says in str(error.value)
    assert "encoders" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "settings", "says"),
    [
        ({"chat": None}, {"template": {"chat": {}}}, r"text\.template\.chat: m's tokenizer has no chat template; wri"),
        ({"chat": "fixed"}, {"template": {"chat": {}}}, r"chat template does not show the user's message once"),
        ({"pad_token": None}, {"pads": {"to": 128}}, r"text\.pads: m's tokenizer has no pad_token; use mode: zeroed"),
        ({}, {"drop_prefix": 40}, r"drop_prefix: 40 rows are dropped \(40\), but the template has only 2 tokens with"),
    ],
)
def test_a_tokenizer_that_lacks_what_the_recipe_needs_is_refused(
    tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    write_tokenizer(tmp_path, "<s> $A", **changes)
    with pytest.raises(ConfigError, match=says):
        RecipeReader(config(**settings), AutoTokenizer.from_pretrained(tmp_path))


def test_a_dropped_row_that_is_kept_all_the_same_leaves_something_of_a_caption(folder: Path) -> None:
    """Where the last token of the template by itself becomes one token with the caption behind it."""
    options = {"template": {"prefix": "See: "}, "drop_prefix": 7}
    with pytest.raises(ConfigError, match=r"7 rows are dropped \(7\), but the template has only 7 tokens"):
        read(folder, "a", **options)
    assert read(folder, "a", **options, keep_prefix=[1, 1], empty={"text": "-"})[1].num_rows == 2


# ---- what is recorded ----

KNOBS: dict[str, Any] = {
    "compute_dtype": {"compute_dtype": "float32"},
    "max_tokens": {"max_tokens": 64},
    "output": {"output": "penultimate"},
    "template.prefix": {"template": {"prefix": "x"}},
    "template.suffix": {"template": {"suffix": "x"}},
    "template.chat": {"template": {"chat": {}}},
    "template.chat, option": {"template": {"chat": {"enable_thinking": False}}},
    "template.system": {"template": {"chat": {}, "system": ""}},
    "template.suffix_after_pads": {"template": {"suffix_after_pads": "x"}},
    "template.special_tokens": {"template": {"special_tokens": False}},
    "drop_prefix": {"drop_prefix": 1},
    "drop_prefix, auto": {"drop_prefix": "auto", "template": {"prefix": "x"}},
    "drop_prefix, prefix": {"drop_prefix": "prefix", "template": {"prefix": "x"}},
    "keep_prefix": {"drop_prefix": 1, "keep_prefix": [1, 0]},
    "max_tokens_of": {"max_tokens_of": "caption"},
    "layers": {"layers": [-2]},
    "layers, order": {"layers": [-1, -2]},
    "layers, other order": {"layers": [-2, -1]},
    "join": {"layers": [-2, -1], "join": "interleave"},
    "join, stack": {"layers": [-2, -1], "join": "stack"},
    "final_norm": {"final_norm": False},
    "final_norm, rms": {"final_norm": "rms"},
    "pads.to": {"pads": {"to": 128}},
    "pads.to, number": {"pads": {"to": 129}},
    "pads.multiple_of": {"pads": {"multiple_of": 8}},
    "pads.add": {"pads": {"add": 8}},
    "pads.mode": {"pads": {"to": 128, "mode": "encoded"}},
    "pads.mode, zeroed": {"pads": {"to": 128, "mode": "zeroed"}},
    "pads.stored": {"pads": {"to": 128, "mode": "encoded", "stored": False}},
    "padding_side": {"pads": {"to": 128, "mode": "zeroed"}, "padding_side": "left"},
    "cleaning": {"cleaning": ["lower", "strip"]},
    "cleaning, order": {"cleaning": ["strip", "lower"]},
    "empty.template": {"empty": "plain"},
    "empty.text": {"empty": {"text": " "}},
    "empty.token": {"empty": {"token": 1}},
}
"""Settings that differ from the default, and from each other, in one field: `field, what of it`."""
MACHINE: dict[str, Any] = {
    "num_gpus": 0,
    "num_cpus": 2,
    "workers": 2,
    "resources": {"accelerator_type:H100": 0.001},
    "cpu_threads": 2,
    "tokens_per_batch": 1,
    "recipe": "mochi",
}


def fields_of(kind: type[Config], names: Iterable[str]) -> set[str]:
    """The names of a configuration's fields; of those that are configurations themselves, their fields."""
    found: set[str] = set()
    for name in names:
        annotation = kind.model_fields[name].annotation
        members = [part for part in (annotation, *get_args(annotation)) if isinstance(part, type)]
        parts = [part for part in members if issubclass(part, Config)]
        found |= {f"{name}.{each}" for part in parts for each in fields_of(part, part.model_fields)} or {name}
    return found


BUILT_IN = [member_of(AnyEncoder, kind) for kind in ("t5", "clip", "auto")]
FIELDS = sorted(set[str]().union(*(fields_of(each, each.embedding_fields()) for each in BUILT_IN)))


def test_the_fields_are_found_by_themselves() -> None:
    assert {"layers", "pads.mode", "template.chat", "empty.token", "compute_dtype"} <= set(FIELDS)
    assert {name.partition(",")[0] for name in KNOBS} == set(FIELDS), "each setting has a case, and no other"


@pytest.mark.parametrize("field", FIELDS)
def test_a_changed_setting_is_another_fingerprint_that_names_it(field: str) -> None:
    others = {name: config(**settings).recorded_fields() for name, settings in KNOBS.items()} | {
        "default": config().recorded_fields()
    }
    cases = [name for name in KNOBS if name.partition(",")[0] == field]
    assert cases, f"{field} has no case in KNOBS"
    for name in cases:
        found = others.pop(name)
        for other, recorded in others.items():
            assert identity_changes(recorded, found), f"{name} is recorded as {other} is"
        changes = identity_changes(others["default"], found)
        assert any(change.startswith(field.partition(".")[0]) for change in changes), changes


def test_without_settings_of_a_recipe_nothing_of_it_is_recorded() -> None:
    assert config().recorded_fields() == {
        "compute_dtype": "bfloat16",
        "max_tokens": 128,
        "output": "last_hidden_state",
    }


def test_machine_fields_are_not_recorded() -> None:
    machine = set[str]().union(*(each.machine_fields for each in BUILT_IN))
    assert machine == MACHINE.keys(), "each has a case"
    for name, value in MACHINE.items():
        assert config(max_tokens=128, **{name: value}).recorded_fields() == config().recorded_fields(), name


@pytest.mark.parametrize("name", KNOBS)
def test_the_settings_can_be_had_back_from_what_is_recorded(name: str) -> None:
    one = config(**KNOBS[name])
    fingerprint = {"kind": "auto", "model": "m", "revision": None, **one.recorded_fields()}
    again = type(one).from_fingerprint("text", fingerprint)
    assert again == one
    assert again.reads_lines is one.reads_lines is (name not in ("compute_dtype", "max_tokens", "output"))


# ---- the shipped ones ----


def lines_of(name: str) -> int:
    """Lines of a recipe's settings in the file."""
    text = (REPOSITORY / "stages" / "encoders" / "recipes" / "recipes.yaml").read_text(encoding="utf-8")
    block = re.split(r"(?m)^(?=\S)", text.partition(f"\n{name}:\n")[2])[0]
    return len(block.partition("settings:")[2].strip().splitlines())


@pytest.mark.parametrize("name", recipes())
def test_a_shipped_recipe_is_a_short_configuration_with_its_origin(name: str) -> None:
    recipe = recipes()[name]
    assert recipe.keys() == {"about", "licence", "source", "width", "settings"}
    assert lines_of(name) < 12
    given = TypeAdapter(AnyEncoder).validate_python({"name": "text", "recipe": name})
    written_out = TypeAdapter(AnyEncoder).validate_python({"name": "text", **recipe["settings"]})
    assert given.recipe == name
    assert given.recorded_fields() == written_out.recorded_fields()
    assert TypeAdapter(AnyEncoder).validate_python(given.model_dump(mode="json")) == given


def test_own_keys_take_the_place_of_the_recipes() -> None:
    found = config(recipe="z-image", kind="auto", model="elsewhere", max_tokens=9)
    assert (found.model, found.max_tokens, found.layers) == ("elsewhere", 9, (-2,))


def test_config_ls_lists_the_recipes_with_model_licence_and_source() -> None:
    rows = {row["name"]: row for row in yaml.safe_load(call("config", "ls", "--json").out) if "licence" in row}
    assert rows.keys() == recipes().keys()
    assert rows["sana"]["model"] == "google/gemma-2-2b-it"
    assert rows["sana"]["source"] == "diffusers SanaPipeline"
