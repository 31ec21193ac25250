"""A trace of some training steps."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfiler:
    """Records the steps first ... last, counted from 1, with torch.profiler.

    Writes `out/profile/steps-FIRST-LAST-rank-RANK.json`, a Chrome trace: operators, kernels, shapes of their tensors.
    """

    def __init__(self, steps: tuple[int, int] | None, out: Path, rank: int):
        self._steps, self._out, self._rank = steps, out, rank
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Starts recording, if `step` is next and the first to record; a resumed training may start within."""
        if self._steps is not None and self._running is None and self._steps[0] <= step <= self._steps[1]:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running = profile(activities=activities, record_shapes=True)
            self._running.start()

    def after(self, step: int, *, last: bool = False) -> None:
        """Writes the trace, if `step` is done and the last to record, or the last of the training."""
        if self._running is None or self._steps is None or (step < self._steps[1] and not last):
            return
        self._running.stop()
        folder = self._out / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        first, end = self._steps
        self._running.export_chrome_trace(str(folder / f"steps-{first}-{end}-rank-{self._rank}.json"))
        self._running = None
