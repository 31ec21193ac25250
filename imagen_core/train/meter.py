"""Means of the metrics of training steps, and how far a training is."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """How far a training is. Rates are over the steps since the last report."""

    step: int
    num_steps: int
    loss: float
    images_per_s: float
    loader_wait: float
    """Fraction of the time spent waiting for batches, in [0, 1]."""
    remaining_s: float
    """Seconds to the last step at this rate; validation, grids and checkpoints not counted."""


OnProgress = Callable[[TrainingProgress], None]


class Meter:
    """Means since the last line of metrics."""

    def __init__(self, waited_s: float = 0.0):
        self.started, self.waited_s = time.perf_counter(), waited_s
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.cosines: list[float] = []
        self.images = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time within this block does not count."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def add(self, loss: float, norm: float, images: int, alignment: float | None = None) -> None:
        self.cosines += [] if alignment is None else [alignment]
        self.losses.append(loss)
        self.norms += [norm] if math.isfinite(norm) else []  # the norm of a skipped step says nothing
        self.images += images

    def values(self, waited_s: float) -> dict[str, float]:
        seconds, steps = time.perf_counter() - self.started, len(self.losses)
        return {
            "loss": math.fsum(self.losses) / steps,
            **({"alignment": math.fsum(self.cosines) / len(self.cosines)} if self.cosines else {}),
            "grad_norm": math.fsum(self.norms) / max(1, len(self.norms)),
            "images_per_s": self.images / seconds,
            "step_s": seconds / steps,
            "loader_wait": (waited_s - self.waited_s) / seconds,
        }


def peak_memory(device: torch.device) -> int:
    """In bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
