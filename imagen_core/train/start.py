"""What a training starts, or resumes, with: for people, and as a line of `starts.jsonl`."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from imagen_core.files import append_line
from imagen_core.train.checkpoints.checkpoint import changed_fields
from imagen_core.train.config import TrainConfig
from imagen_core.train.context import TrainingContext
from imagen_core.train.data.store import training_samples
from imagen_core.train.errors import TrainError
from imagen_core.train.logs import METRICS, read_metrics

STARTS = "starts.jsonl"
_SCHEDULES = ("logging.", "checkpoints.", "validation.", "grid.")


@dataclass(frozen=True, slots=True)
class TrainingStart:
    """The model, the machine and the data of one start of a training."""

    step: int
    """Steps that earlier starts have made; 0: the training begins."""
    num_steps: int
    model: str
    """Family of the network, with the side of its images in pixels unless it is a prior."""
    parameters: int
    device: str
    processes: int
    precision: str
    samples: int
    """Samples of the store to train on."""
    batch_size: int
    """Of all processes together."""
    torch: str
    changes: tuple[str, ...] = ()
    """`field: old -> new` of each setting that differs from the checkpoint's, schedules of logging left out."""
    checkpoint_every_steps: int | None = None
    """Steps between checkpoints; None in starts of earlier versions."""
    chosen: tuple[int, int] | None = None
    """Samples for which `where` is true, and samples of the store; None without a condition."""

    def lines(self) -> list[str]:
        """Lines for people."""
        where = self.device if self.processes == 1 else f"{self.processes} processes on {self.device}"
        epochs = self.num_steps * self.batch_size / max(1, self.samples)
        begins = f"resumed from step {self.step:,}" if self.step else "begins"
        return [
            *([] if self.chosen is None else ["where {:,} of {:,} samples of the store".format(*self.chosen)]),
            f"model {self.model}, {self.parameters:,} parameters, {self.precision} on {where}",
            f"data {self.samples:,} samples, batches of {self.batch_size:,}: {self.num_steps:,} steps are "
            f"{epochs:,.1f} epochs; {begins}",
            *(f"changed since the checkpoint: {change}" for change in self.changes),
        ]


def training_start(context: TrainingContext, step: int, saved: Mapping[str, Any] | None) -> TrainingStart:
    """Describes a start from step `step`; `saved` is the configuration in the checkpoint resumed from."""
    config, denoiser = context.config, context.denoiser
    device = context.world.device
    family, size = config.denoiser.network.family, getattr(config.denoiser, "size_px", None)
    changes = [] if saved is None else changed_fields(_with_defaults(saved), config.model_dump(mode="json"))
    return TrainingStart(
        step=step,
        num_steps=config.num_steps,
        model=family if size is None else f"{family} of {size} px",
        parameters=sum(parameter.numel() for parameter in denoiser.parameters()),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        processes=context.world.size,
        precision=config.precision,
        samples=len(training_samples(context.store, config)),
        batch_size=config.batch_size,
        torch=torch.__version__,
        checkpoint_every_steps=config.checkpoints.every_steps,
        chosen=None if config.where is None else (len(context.store), context.store.manifest.num_samples),
        changes=tuple(change for change in changes if not change.startswith(_SCHEDULES)),
    )


def _with_defaults(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved configuration; settings that did not exist when it was written have their defaults."""
    try:
        return TrainConfig.model_validate(saved).model_dump(mode="json")
    except ValidationError:
        return saved  # of another version: all that differs is listed


def refuse_lost(out: Path, config: TrainConfig) -> None:
    """Refuses a folder without a checkpoint whose training has saved one: to begin it anew would hide the loss.

    Raises:
        TrainError: a start has resumed from one, or there are metrics of steps after the first one was due.
    """
    starts = _starts(out)
    every = starts[-1].get("checkpoint_every_steps") if starts else None
    every = every if isinstance(every, int) else config.checkpoints.every_steps
    resumed = max((start["step"] for start in starts), default=0)
    step = max((line["step"] for line in read_metrics(out / METRICS)), default=0)
    if resumed or step > every:
        raise TrainError(
            f"{out}: this training was at step {max(step, resumed)} and has saved checkpoints, but none is in "
            f"{out / 'checkpoints'}; put one back to go on, or delete {METRICS} and {STARTS} to begin at step 1"
        )


def _starts(out: Path) -> list[dict[str, Any]]:
    """The lines of `starts.jsonl` that can be read."""
    path, found = out / STARTS, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [start for start in found if isinstance(start, dict) and isinstance(start.get("step"), int)]


def record_start(out: Path, start: TrainingStart) -> None:
    """Appends a start to `out/starts.jsonl`, with the time in seconds since 1970."""
    append_line(out / STARTS, json.dumps({"time": round(time.time(), 3), **asdict(start)}))
