"""What a card says of where data came from."""

import re
from typing import Any

import yaml

from imagen_core.far import without_secrets
from pipeline.storage.run_folder import CONFIG, RunFolder

_FIELDS = ("path", "revision", "split", "where")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def describe_run(run: RunFolder | None) -> tuple[str, dict[str, str]]:
    """The source of a run, in words, and the recipe of each encoder that has a named one.

    Of a local path only the last name is told: the folders around it are of no use elsewhere.
    """
    config = {} if run is None else read_config(run)
    source = config.get("source")
    recipes = {
        str(each["name"]): str(each["recipe"])
        for each in config.get("encoders") or ()
        if isinstance(each, dict) and each.get("name") and each.get("recipe")
    }
    if not isinstance(source, dict) or "kind" not in source:
        return "unknown", recipes
    kind = str(source["kind"])
    told = [f"{name} {_public(kind, name, source[name])}" for name in _FIELDS if source.get(name)]
    return f"{kind}{': ' if told else ''}{', '.join(told)}", recipes


def read_config(run: RunFolder) -> dict[str, Any]:
    """The configuration of a run; {} if there is none that can be read."""
    if run.storage.size(CONFIG) is None:
        return {}
    try:
        config = yaml.safe_load(run.storage.read(CONFIG))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return config if isinstance(config, dict) else {}


def _public(kind: str, name: str, value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_public(kind, name, each) for each in value)
    text = str(value)
    if "://" in text:
        return without_secrets(text)
    if name != "path" or (kind == "huggingface" and _HUB_ID.fullmatch(text)):
        return text
    return text.rstrip("/").rpartition("/")[2]
