"""Where metrics go: lines of JSON, TensorBoard, or Weights & Biases."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

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
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = path.with_name(f".{path.name}.tmp")
            kept.write_text("".join(line for line in lines if _step_of(line) <= resumed_step), encoding="utf-8")
            kept.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        return

    def close(self) -> None:
        self._file.close()


def last_values(path: Path) -> dict[str, float]:
    """The newest value of each metric in a `metrics.jsonl`; empty where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    complete = (line for line in lines if _step_of(line) < float("inf"))
    return {name: value for line in complete for name, value in json.loads(line).items()}


def _step_of(line: str) -> float:
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
