"""Seconds that a prior and each stage of a cascade take for an image."""

import time
from collections import defaultdict

import torch


class StageTimes:
    """Adds up the time of each stage over the batches of a sampling."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._images = 0
        self._last = 0.0

    def start(self, images: int) -> None:
        """A batch of so many images begins."""
        self._images += images
        self._last = self._now()

    def done(self, part: str) -> None:
        """The prior, or the stage of so many pixels, has drawn the batch."""
        now = self._now()
        self._seconds[part] += now - self._last
        self._last = now

    def seconds_per_image(self) -> dict[str, float]:
        """Of the prior and by size in pixels, with the stage's move to the device; empty if nothing was drawn."""
        return {part: round(seconds / self._images, 4) for part, seconds in self._seconds.items()}

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()  # a GPU runs behind the program
        return time.perf_counter()
