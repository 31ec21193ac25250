"""The configurations that ship with the workflows, and the model presets, by name."""

from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from pipeline.config import local_path, parse_yaml
from pipeline.errors import ConfigError
from pipeline.storage.run_folder import CONFIG, PLAN, RunFolder

_MODELS = "pipeline.models"


def list_presets() -> list[dict[str, str]]:
    """Every shipped YAML: its workflow, name, path, and the comment on its first line."""
    root = Path(str(files("workflows"))) / "configs"
    return [
        {
            "kind": "config",
            "workflow": path.parent.name,
            "name": path.stem,
            "path": str(path),
            "summary": path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip(),
        }
        for path in sorted(root.glob("*/*.yaml"))
    ]


def list_recipes() -> list[dict[str, str]]:
    """Every shipped recipe of a text encoder: its name, model, the licence of its weights, and what it is."""
    path = Path(str(files("stages"))) / "encoders" / "recipes" / "recipes.yaml"
    return [
        {
            "kind": "encoder_recipe",
            "name": name,
            "model": recipe["settings"]["model"],
            "licence": recipe["licence"],
            "source": recipe["source"],
            "summary": recipe["about"],
        }
        for name, recipe in sorted(cast(dict[str, Any], parse_yaml(path.read_bytes(), path)).items())
    ]


def list_models() -> list[dict[str, object]]:
    """The model presets of every installed library, found through the `pipeline.models` entry points.

    Each has at least `kind`, `name`, `parameters` (exact, a plain integer) and `summary`.
    """
    return [row for entry in sorted(entry_points(group=_MODELS)) for row in entry.load()()]


def find_config(workflow: str, name: str, option: str = "--config") -> Path:
    """The file of this path, or the shipped configuration of this name; `option` is how the user gave it.

    Raises:
        ConfigError: neither exists.
    """
    path = local_path(name, option)
    if path.exists() or path.suffix:
        return path
    shipped = {preset["name"]: Path(preset["path"]) for preset in list_presets() if preset["workflow"] == workflow}
    if name not in shipped:
        choices = ", ".join(sorted(shipped)) or "(none)"
        raise ConfigError(f"{option} {name}: no such file or shipped configuration; shipped: {choices}")
    return shipped[name]


def configuration_of_run(workflow: str, out: str) -> dict[str, Any] | None:
    """The configuration that the run in folder `out` last had; None if there is no run.

    Raises:
        ConfigError: it is a run of another workflow.
    """
    run = RunFolder(out)
    if run.storage.size(CONFIG) is None:
        return None
    plan = run.read_engine_file(PLAN) or {}
    if plan.get("workflow", workflow) != workflow:
        raise ConfigError(f"--out {out}: is a run of {plan['workflow']}; use pipeline run {plan['workflow']}")
    return parse_yaml(run.storage.read(CONFIG), f"{out}/{CONFIG}")
