"""The table of recipes in the documents says what recipes.yaml does."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from stages.encoders.recipes.settings import Pads, RecipeSettings
from stages.encoders.recipes.shipped import recipes
from stages.encoders.registry import AnyEncoder
from tests.runs import REPOSITORY

PAGE = REPOSITORY / "docs" / "how-to" / "encoder-recipes.md"
LAYERS_OF = {"hidream-llama": 32, "ltx2": 48}
"""Layers of the models of which all are taken."""


def config_of(name: str) -> Any:
    return TypeAdapter(AnyEncoder).validate_python({"name": "text", "recipe": name})


def row(name: str) -> str:
    """The line of the table for a recipe."""
    recipe, config = recipes()[name], config_of(name)
    cells = [
        f"`{name}`",
        f"`{config.model}`",
        states(config),
        f"{recipe['width']:,}",
        around(config),
        str(config.max_tokens),
        pads(config.pads, config.padding_side),
        recipe["licence"],
    ]
    return f"| {' | '.join(cells)} |"


def states(config: RecipeSettings) -> str:
    if config.layers is None:
        return {"last_hidden_state": "last"}.get(config.output, config.output)
    joined = ", ".join(map(str, config.layers)) + ("" if config.join == "concat" else f"; {config.join}")
    return joined + ("" if config.final_norm is True else f"; final_norm: {str(config.final_norm).lower()}")


def around(config: RecipeSettings) -> str:
    parts = list(config.cleaning)
    if config.template is not None:
        options = [f"{key}: {str(value).lower()}" for key, value in (config.template.chat or {}).items()]
        parts += ["chat"] * (config.template.chat is not None) + options
        parts += [
            part for part in ("system", "prefix", "suffix", "suffix_after_pads") if getattr(config.template, part)
        ]
        parts += ["no special tokens"] * (not config.template.special_tokens)
    parts += [f"drop {config.drop_prefix}"] * (config.drop_prefix != 0)
    parts += ["keep {} + {}".format(*config.keep_prefix)] * (sum(config.keep_prefix) > 0)
    parts += ['`""` without it'] * (not config.empty.template)
    parts += [f'`""` is token {config.empty.token}'] * (config.empty.token is not None)
    return ", ".join(parts) or "-"


def pads(found: Pads | None, side: str) -> str:
    if found is None:
        return "none"
    number = f"to {found.to}" if found.to else f"{found.add} more"
    number = f"to a multiple of {found.multiple_of}" if found.multiple_of else number
    kept = "" if found.stored else ", not stored"
    return f"{number}, {found.mode}{'' if side == 'right' else ', left'}{kept}"


@pytest.mark.parametrize("name", recipes())
def test_the_table_has_the_numbers_of_each_recipe(name: str) -> None:
    assert row(name) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_table_has_no_other_recipe() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| recipe | model |"))
    rows = lines[start + 2 : lines.index("", start)]
    assert rows == [row(name) for name in recipes()]


@pytest.mark.parametrize("name", recipes())
def test_the_width_is_that_of_as_many_layers_as_are_joined(name: str) -> None:
    config = config_of(name)
    chosen = config._chosen(LAYERS_OF.get(name, 36)) if config.layers is not None else [1]
    width = recipes()[name]["width"]
    assert width % len(chosen) == 0
    assert width // len(chosen) in (768, 1280, 2048, 2304, 2560, 3072, 3584, 3840, 4096)


def test_every_recipe_with_a_difference_is_one_that_ships() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("| recipe | where it differs")[2].partition("\n\n")[0]
    named = [name for line in text.splitlines()[2:] for name in line.split("|")[1].replace("`", "").split(", ")]
    assert {name.strip() for name in named} - {"all"} <= recipes().keys()
