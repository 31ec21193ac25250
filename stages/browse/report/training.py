"""What the report of a training shows: its curves, the last grid of samples, the configuration."""

import base64
import math
from dataclasses import dataclass
from typing import Any

from pipeline.errors import PipelineError
from pipeline.storage import Storage
from stages.browse.training.curves import Curves, View, curves_of
from stages.browse.training.folder import config_text, grid_name, grid_steps, state_of
from stages.browse.training.metrics import MetricsFile
from stages.browse.web import Part, part

_MOST_GRID_BYTES = 32 * 2**20
_READ_S = 600.0


@dataclass(frozen=True, slots=True)
class Grid:
    """A grid of samples: its step, and the file as a data URL."""

    step: int
    url: str


@dataclass(frozen=True, slots=True)
class TrainingContent:
    """What a report of a training shows.

    Attributes:
        last: step and value of the newest value of each metric.
        unreadable: lines of metrics that are damaged.
        grid: None without grids.
    """

    title: str
    state: str
    last: dict[str, tuple[int, float]]
    unreadable: int
    curves: Curves
    grid: Part[Grid | None]
    config: Part[str]

    def summary(self) -> dict[str, Any]:
        """For --json: what is known in numbers and words; a value that is not finite is null."""
        values = {
            name: {"step": step, "value": value if math.isfinite(value) else None}
            for name, (step, value) in self.last.items()
        }
        grid = self.grid.value
        return {
            "title": self.title,
            "state": self.state,
            "last": values,
            "unreadable_lines": self.unreadable,
            "grid_step": grid.step if grid is not None else None,
        }


def training_content(storage: Storage) -> TrainingContent:
    """Collects it from a training's folder.

    Raises:
        PipelineError, OSError: the metrics cannot be read.
    """
    metrics = MetricsFile(storage).read(_READ_S)
    name = storage.url.rstrip("/").rpartition("/")[2] or storage.url
    return TrainingContent(
        title=name,
        state=state_of(storage),
        last=metrics.last(),
        unreadable=metrics.unreadable,
        curves=curves_of(((name, metrics),), View()),
        grid=part(lambda: _last_grid(storage)),
        config=part(lambda: config_text(storage)),
    )


def _last_grid(storage: Storage) -> Grid | None:
    steps = grid_steps(storage)
    if not steps:
        return None
    name = grid_name(steps[-1])
    size = storage.size(name)
    if size is not None and size > _MOST_GRID_BYTES:
        raise PipelineError(f"{storage.url}/{name}: has {size:,} bytes, more than 32 MiB; open it by itself")
    return Grid(steps[-1], f"data:image/png;base64,{base64.b64encode(storage.read(name)).decode('ascii')}")
