"""Where metrics go: lines of JSON, TensorBoard, or Weights & Biases."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from imagen_core.files import write_durably
from imagen_core.train.config import TrainConfig
from imagen_core.train.errors import TrainError


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
    """`metrics.jsonl`: one object per line, by rising step; lines after the step resumed from are removed."""

    def __init__(self, path: Path, resumed_step: int):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= resumed_step]
        if kept != lines or not path.exists():
            write_durably(path, b"".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # the metrics up to a checkpoint are not written again

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        return

    def close(self) -> None:
        self._file.close()


def last_values(path: Path) -> dict[str, float]:
    """The newest value of each metric in a `metrics.jsonl`; empty where there is no file."""
    return {name: value for line in _complete_lines(path) for name, value in json.loads(line).items()}


def logged_values(path: Path, name: str) -> dict[int, float]:
    """Step -> value of one metric in a `metrics.jsonl`."""
    values = map(json.loads, _complete_lines(path))
    return {int(line["step"]): float(line[name]) for line in values if name in line}


def _complete_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [line for line in lines if _step_of(line) < float("inf")]


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for one that a kill truncated."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


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
                self._loggers.append(JsonLines(out / "metrics.jsonl", resumed_step))
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
