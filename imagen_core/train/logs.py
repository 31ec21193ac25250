"""Where metrics go: lines of JSON, TensorBoard, or Weights & Biases."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from imagen_core.files import make_folder, write_durably
from imagen_core.train.config import TrainConfig
from imagen_core.train.errors import TrainError

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"


class Logger(Protocol):
    """One place where metrics go."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step."""
        ...

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """uint8 (h, w, 3)."""
        ...

    def close(self) -> None:
        """Writes what is buffered."""
        ...


class JsonLines:
    """`metrics.jsonl`: one object per line, by rising step.

    Lines after the step resumed from are removed, as is what cannot be read. A line that is there already, of a step
    that was evaluated again because a kill followed, is not repeated.
    """

    def __init__(self, path: Path, resumed_step: int):
        make_folder(path.parent)
        kept = [line for line in read_metrics(path, warn=True) if line["step"] <= resumed_step]
        if path.exists():
            write_durably(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._there = {(line["step"], frozenset(line)) for line in kept if line["step"] == resumed_step}
        self._file = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, **values}
        if (step, frozenset(line)) not in self._there:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())  # the metrics up to a checkpoint are not written again

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        return

    def close(self) -> None:
        self._file.close()


def last_values(path: Path) -> dict[str, float]:
    """The newest value of each metric in a `metrics.jsonl`; empty where there is no file."""
    return {name: value for line in read_metrics(path) for name, value in line.items()}


def read_metrics(path: Path, *, warn: bool = False) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` that can be read; none where there is no file.

    Args:
        warn: name lines that cannot be read, except for a last one that a kill cut.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found, bad = [], []
    for number, line in enumerate(text.split("\n"), 1):
        values = _parsed(line)
        if values is not None:
            found.append(values)
        elif line:
            bad.append(number)
    if warn and any(number < text.count("\n") + 1 for number in bad):
        log.warning("%s: line %d of %d cannot be read, and is removed", path, bad[0], text.count("\n"))
    return found


def _parsed(line: str) -> dict[str, Any] | None:
    """The numbers of a line with a step; None for one that a kill truncated, or that was damaged."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int) or values["step"] < 0:
        return None
    return values if all(isinstance(value, int | float) for value in values.values()) else None


class TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, folder: Path, resumed_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainError("loggers: tensorboard is not installed; pip install 'tensorboard>=2.18'") from error
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, folder: Path, config: TrainConfig):
        try:
            import wandb
        except ImportError as error:
            raise TrainError("loggers: wandb is not installed; pip install 'wandb>=0.18'") from error
        self._wandb = wandb
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # the same when the run resumes
        settings = config.model_dump(mode="json")
        try:
            self._run = wandb.init(dir=str(folder), id=name, config=settings, resume="allow")
        except wandb.Error as error:
            raise TrainError(f"loggers: wandb: {error}; run `wandb login`, or set WANDB_MODE=offline") from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Loggers:
    """All loggers of a run; none on processes that do not write."""

    def __init__(self, config: TrainConfig, out: Path, resumed_step: int, *, writes: bool):
        self._loggers: list[Logger] = []
        for name in config.logging.loggers if writes else ():
            if name == "jsonl":
                self._loggers.append(JsonLines(out / METRICS, resumed_step))
            elif name == "tensorboard":
                self._loggers.append(TensorBoard(out / "tensorboard", resumed_step))
            else:
                self._loggers.append(Wandb(out, config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.scalars(step, values)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        for logger in self._loggers:
            logger.image(step, name, pixels)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()
