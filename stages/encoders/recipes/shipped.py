"""The recipes that ship with the toolkit, by name."""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from pipeline.config import parse_yaml

RECIPE = "recipe"


@cache
def recipes() -> dict[str, dict[str, Any]]:
    """Each recipe: `about` it, the `licence` of the encoder's weights, the `source` that it is equal to, the `width`
    of its rows, and its `settings`."""
    file = files("stages.encoders.recipes").joinpath("recipes.yaml")
    found: Any = parse_yaml(file.read_bytes(), file.name)
    return found


def with_recipe(config: Any) -> Any:
    """The configuration of an encoder with the settings of the recipe that it names, where it has none of its own.

    Raises:
        ValueError: there is no such recipe.
    """
    name = config.get(RECIPE) if isinstance(config, Mapping) else None
    if name is None:
        return config
    if name not in recipes():
        raise ValueError(f"there is no recipe {name!r}; choose from {', '.join(sorted(recipes()))}")
    return {**recipes()[name]["settings"], **config}
