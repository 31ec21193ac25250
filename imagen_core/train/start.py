"""What a training starts, or resumes, with: for people, and as a line of `starts.jsonl`."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from imagen_core.differences import changed_fields
from imagen_core.files import append_line
from imagen_core.store.read.caption_choice import caption_shares
from imagen_core.train.components import store_name
from imagen_core.train.config import TrainConfig
from imagen_core.train.context import TrainingContext
from imagen_core.train.data.stores import num_training_samples
from imagen_core.train.errors import TrainError
from imagen_core.train.logs import METRICS, read_metrics
from imagen_core.train.lora.adapter import saved_parameters

STARTS = "starts.jsonl"
_SCHEDULES = ("logging.", "checkpoints.", "validation.", "grid.")


@dataclass(frozen=True, slots=True)
class MixedStore:
    """One store of a mixture."""

    name: str
    samples: int
    """Samples to train on."""
    share: float
    """The part of all samples seen that comes from it, 0..1."""


@dataclass(frozen=True, slots=True)
class TrainingStart:
    """The model, the machine and the data of one start of a training."""

    step: int
    """Steps that earlier starts have made; 0: the training begins."""
    num_steps: int
    model: str
    """Family of the network, with the side of its images in pixels unless it is a prior."""
    parameters: int
    """Of the network, without an adapter's."""
    device: str
    processes: int
    precision: str
    samples: int
    """Samples to train on, of all stores."""
    batch_size: int
    """Of all processes together."""
    torch: str
    changes: tuple[str, ...] = ()
    """`field: old -> new` of each setting that differs from the checkpoint's, schedules of logging left out."""
    checkpoint_every_steps: int | None = None
    """Steps between checkpoints; None in starts of earlier versions."""
    stores: tuple[MixedStore, ...] = ()
    """The stores of a mixture."""
    chosen: tuple[int, int] | None = None
    """Samples for which `where` is true, and samples of the store; None without a condition."""
    adapter_parameters: int | None = None
    """Parameters of the adapter, which alone is trained; None where all weights are."""
    captions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By name of each store from whose sets of captions more than the first is read: the part of the captions that
    comes from each set, 0..1, of samples that have captions of all sets."""

    def lines(self) -> list[str]:
        """Lines for people."""
        adapter = self.adapter_parameters
        where = self.device if self.processes == 1 else f"{self.processes} processes on {self.device}"
        begins = f"resumed from step {self.step:,}" if self.step else "begins"
        seen = self.num_steps * self.batch_size
        epochs = "samples" if self.stores else f"{seen / max(1, self.samples):,.1f} epochs"
        count = f"{seen:,} " if self.stores else ""
        return [
            *([] if self.chosen is None else ["where {:,} of {:,} samples of the store".format(*self.chosen)]),
            f"model {self.model}, {self.parameters:,} parameters, {self.precision} on {where}",
            *([] if adapter is None else [f"adapter of {adapter:,} parameters, which alone are trained"]),
            f"data {self.samples:,} samples, batches of {self.batch_size:,}: {self.num_steps:,} steps are "
            f"{count}{epochs}; {begins}",
            *(
                f"store {store.name}: {store.samples:,} samples, {store.share:.4g} of each batch: "
                f"{seen * store.share / max(1, store.samples):,.1f} epochs"
                for store in self.stores
            ),
            *(
                f"captions of {store}: " + ", ".join(f"{name} {share:.4g}" for name, share in shares.items())
                for store, shares in self.captions.items()
            ),
            *(f"changed since the checkpoint: {change}" for change in self.changes),
        ]


def training_start(context: TrainingContext, step: int, saved: Mapping[str, Any] | None) -> TrainingStart:
    """Describes a start from step `step`; `saved` is the configuration in the checkpoint resumed from."""
    config, denoiser = context.config, context.denoiser
    device = context.world.device
    family, size = config.denoiser.network.family, getattr(config.denoiser, "size_px", None)
    now = config.model_dump(mode="json")
    changes = [] if saved is None else changed_fields(*map(_stores_by_name, (_with_defaults(saved), now)))
    samples = num_training_samples(context.stores, config)
    adapter = None
    if config.lora is not None:
        adapter = sum(parameter.numel() for parameter in saved_parameters(denoiser).values())
    stores = () if config.store is not None else tuple(MixedStore(n, samples[n], config.shares[n]) for n in samples)
    return TrainingStart(
        step=step,
        num_steps=config.num_steps,
        model=family if size is None else f"{family} of {size} px",
        parameters=sum(parameter.numel() for parameter in denoiser.parameters()) - (adapter or 0),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        processes=context.world.size,
        precision=config.precision,
        samples=sum(samples.values()),
        batch_size=config.batch_size,
        torch=torch.__version__,
        checkpoint_every_steps=config.checkpoints.every_steps,
        stores=stores,
        chosen=_chosen(context),
        adapter_parameters=adapter,
        captions=_caption_shares(context),
        changes=tuple(change for change in changes if not change.startswith(_SCHEDULES)),
    )


def _caption_shares(context: TrainingContext) -> dict[str, dict[str, float]]:
    config = context.config
    if not config.reads_captions:
        return {}
    each = config.by_store()
    found = {name: caption_shares(store, each[name].captions) for name, store in context.stores.items()}
    return {name: shares for name, shares in found.items() if [*shares] != [*context.stores[name].caption_sets][:1]}


def _chosen(context: TrainingContext) -> tuple[int, int] | None:
    if context.config.where is None:
        return None
    stores = context.stores.values()
    return sum(map(len, stores)), sum(store.manifest.num_samples for store in stores)


def _with_defaults(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved configuration; settings that did not exist when it was written have their defaults."""
    try:
        return TrainConfig.model_validate(saved).model_dump(mode="json")
    except ValidationError:
        return saved  # of another version: all that differs is listed


def _stores_by_name(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose list of stores is a mapping, so that what differs is told by name."""
    stores = {share.get("name") or store_name(share.get("path", "")): share for share in config.get("stores", ())}
    return {**config, "stores": stores}


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
