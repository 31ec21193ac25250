"""What a training's folder has besides its metrics: configuration, starts, grids, state."""

import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from imagen_core.differences import differing
from pipeline.config import parse_yaml
from pipeline.errors import ConfigError
from pipeline.storage import Storage
from pipeline.storage.lock import EXPIRE_S, read_lease
from pipeline.storage.run_folder import CONFIG, SUMMARY

_GRIDS, _STARTS = "grids", "starts.jsonl"
_GRID = re.compile(r"step-(\d{8,12})\.png", re.ASCII)
_MOST_CONFIG_BYTES = 2**20
_MOST_CONFIG_VALUES = 100_000
_MOST_STARTS_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a training: at which step, when (seconds since 1970; None if that is unknown), on what."""

    step: int
    time: float | None
    device: str
    processes: int | None

    @property
    def when(self) -> str:
        """The time in UTC."""
        return "-" if self.time is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.time))


def state_of(storage: Storage) -> str:
    """Whether a training runs, or how its last run ended, in a word or some."""
    lease = read_lease(storage)
    if lease is not None and abs(time.time() - lease["renewed"]) <= EXPIRE_S:
        return "running"
    summary = storage.read_json_if_whole(SUMMARY)
    return str(summary.get("outcome", "ended")) if isinstance(summary, dict) else "not finished"


def grid_steps(storage: Storage) -> list[int]:
    """The steps with a grid of samples, rising."""
    found = (_GRID.fullmatch(name) for name in storage.names(_GRIDS))
    return sorted(int(match[1]) for match in found if match)


def grid_name(step: int) -> str:
    """The file of a step's grid."""
    return f"{_GRIDS}/step-{step:08d}.png"


def config_text(storage: Storage) -> str:
    """The configuration as it was written.

    Raises:
        ConfigError: there is none, or it is larger than 1 MiB.
    """
    size = storage.size(CONFIG)
    if size is None:
        raise ConfigError(f"{storage.url}: has no {CONFIG}, so the configuration is not known")
    if size > _MOST_CONFIG_BYTES:
        raise ConfigError(f"{storage.url}/{CONFIG}: has {size:,} bytes, more than 1 MiB; read it with an editor")
    return storage.read(CONFIG).decode("utf-8", "replace")


def config_differences(storages: Sequence[Storage]) -> list[tuple[str, tuple[str | None, ...]]]:
    """The settings in which configurations differ: name and value, as JSON, in each; None where one has it not.

    Raises:
        ConfigError: a configuration is missing or cannot be read.
    """
    return differing([_config(storage) for storage in storages])


def starts_of(storage: Storage) -> list[Start]:
    """The starts of a training in their order, without lines that cannot be read."""
    size = storage.size(_STARTS)
    if size is None:
        return []
    found = []
    skipped = max(0, size - _MOST_STARTS_BYTES)
    lines = storage.read_part(_STARTS, skipped, _MOST_STARTS_BYTES).splitlines()
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            values = json.loads(line)
            started, processes = values.get("time"), values.get("processes")
            found.append(
                Start(
                    int(values["step"]),
                    float(started) if isinstance(started, int | float) and 0 <= started < 1e11 else None,
                    str(values.get("device", "-")),
                    processes if isinstance(processes, int) else None,
                )
            )
    return found


def _config(storage: Storage) -> Any:
    value = parse_yaml(config_text(storage).encode(), f"{storage.url}/{CONFIG}")
    todo: list[Any] = [value]
    for _ in range(_MOST_CONFIG_VALUES):  # aliases can make few bytes many values
        if not todo:
            return value
        each = todo.pop()
        todo += [*each.values()] if isinstance(each, dict) else each if isinstance(each, list) else []
    raise ConfigError(f"{storage.url}/{CONFIG}: has more than {_MOST_CONFIG_VALUES:,} values; read it with an editor")
