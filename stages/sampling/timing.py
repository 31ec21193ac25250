"""Seconds that a prior and each stage of a cascade take per image."""

import time
from collections import defaultdict

import torch


class StageTimes:
    """Adds up the time of each stage over the batches of a sampling."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self.num_images = 0
        """Images sampled so far."""
        self._last = 0.0

    def start(self, images: int) -> None:
        """A batch of this many images begins."""
        self.num_images += images
        self._last = self._now()

    def done(self, part: str) -> None:
        """The prior, or the stage of this size in pixels, has finished the batch."""
        now = self._now()
        self._seconds[part] += now - self._last
        self._last = now

    def seconds_per_image(self) -> dict[str, float]:
        """By part: `prior`, or a stage's size in pixels, its move to the device included; empty if nothing ran."""
        return {part: round(seconds / self.num_images, 4) for part, seconds in self._seconds.items()}

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()  # a GPU runs behind the program
        return time.perf_counter()
