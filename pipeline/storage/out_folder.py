"""Refuses a run folder in which a run would spoil other data, or take its own files for input."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from pipeline.errors import ConfigError, PipelineError, UnavailableError
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.lock import PARTS
from pipeline.storage.open import open_storage
from pipeline.storage.run_folder import CONFIG, ESTIMATE, METRICS, PLAN, STORE, SUMMARY, RunFolder

_PATH_KEYS = frozenset(("path", "folder", "store", "checkpoint", "file_list", "model", "clip_images", "clip_texts"))
_PARTS_OF_RUNS = frozenset(
    (STORE, "state", "staging", "quarantine", "input", "retries", "report", "checkpoints", "estimate", PARTS)
)
_FILES_OF_RUNS = frozenset(
    (CONFIG, PLAN, SUMMARY, METRICS, ESTIMATE, "events.jsonl", "start.json", "starts.jsonl", "validation.json")
)
_MARKS_OF_RUNS = frozenset((PLAN, "events.jsonl", "state", "checkpoints"))
_LOGS = frozenset((".log", ".out", ".err", ".yaml", ".yml", ".sh", ".md", ".pid"))
_ELSEWHERE = "give --out a folder of its own, next to the data"


def check_out(run: RunFolder, workflow: str, config: Mapping[str, Any]) -> None:
    """Checks that a run in this folder touches no data but its own. Writes nothing.

    Args:
        config: the configuration as JSON; what its keys such as `path` or `store` name is the run's input.

    Raises:
        ConfigError: it is a file; or the folder is inside the input, a store, a checkpoint or part of another run,
            or it holds other data, also the input.
    """
    out = run.url
    if isinstance(run.storage, LocalStorage) and run.root.exists() and not run.root.is_dir():
        raise ConfigError(f"--out {out}: is not a folder; choose a folder that you can write to")
    place = _place(out)
    for key, value in _inputs(config):
        source = _place(value)
        if _is_in(place, source):
            raise ConfigError(f"--out {out}: is inside {key}={value}, so the run's files would be input; {_ELSEWHERE}")
        if _is_in(source, place) and _workflow_of(run.storage) != workflow:
            raise ConfigError(f"--out {out}: holds {key}={value}, which the run must not change; {_ELSEWHERE}")
    _refuse_inside_others(out, place)
    foreign = _foreign_entries(run.storage)
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ConfigError(
            f"--out {out}: holds {', '.join(foreign[:3])}{more}, which no run made; give a new or empty folder, or "
            "that of an earlier run"
        )


def _inputs(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Key and path of everything that a configuration reads; of a pattern, the folder before its wildcards."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name == "path" and value.get("file_list"):
                continue  # only the listed files are read
            yield from _inputs(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _inputs(item, f"{key}.{number}")
    elif isinstance(value, str) and value and key.rpartition(".")[2] in _PATH_KEYS:
        yield key, value.partition("**")[0].rstrip("/") if "**" in value else value


def _place(path: str) -> str:
    """A path or URL in one spelling, with links resolved."""
    protocol, mark, rest = path.partition("://")
    if not mark or protocol in ("file", "local"):
        return os.path.realpath(os.path.expanduser(rest if mark else path))
    return f"{protocol}://{rest.strip('/')}"


def _is_in(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def _refuse_inside_others(out: str, place: str) -> None:
    """Refuses a folder inside a store, a checkpoint, or a part that another run made.

    Raises:
        ConfigError: names what it is inside of.
    """
    inside = [place]
    protocol, mark, rest = place.rpartition("://")
    for above in PurePosixPath(rest).parents:
        if str(above) in (".", "/"):
            break
        inside.append(f"{protocol}{mark}{above}")
    for index, folder in enumerate(inside):
        entries = _entries(folder)
        if entries.get("manifest.json") is False and entries.get("samples"):
            raise ConfigError(f"--out {out}: is inside the store {folder}; {_ELSEWHERE}")
        if entries.get("state.json") is False and any(name.endswith(".safetensors") for name in entries):
            raise ConfigError(f"--out {out}: is inside the checkpoint {folder}; {_ELSEWHERE}")
        part = PurePosixPath(inside[index - 1]).name if index else ""
        if part in _PARTS_OF_RUNS and PLAN in entries and CONFIG in entries:
            raise ConfigError(f"--out {out}: is inside {part}/ of the run {folder}; {_ELSEWHERE}")


def _entries(place: str) -> dict[str, bool]:
    """What is in a folder: whether each name is a folder. Empty for a folder that is not there, or may not be read."""
    try:
        return dict(open_storage(place).entries())
    except UnavailableError:
        raise
    except (OSError, PipelineError):
        return {}


def _foreign_entries(storage: Storage) -> Sequence[str]:
    """What no run made, in a folder that is not one of a run; hidden files and logs do not count."""
    entries = dict(storage.entries())
    if _MARKS_OF_RUNS & entries.keys():
        return []
    return [
        f"{name}/" if is_folder else name
        for name, is_folder in sorted(entries.items())
        if not name.startswith(".")
        and PurePosixPath(name).suffix not in _LOGS
        and name not in (_PARTS_OF_RUNS if is_folder else _FILES_OF_RUNS)
        and not (is_folder and _MARKS_OF_RUNS & _entries(f"{storage.url}/{name}").keys())
    ]


def _workflow_of(storage: Storage) -> str | None:
    """The workflow of the last run in the folder."""
    plan = storage.read_json_if_whole(PLAN)
    return plan.get("workflow") if isinstance(plan, dict) else None
