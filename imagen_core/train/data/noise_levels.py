"""Which noise levels training visits: the time of a sample, from its uniform number, and the weight of its loss.

Importance sampling by the losses' second moment: Nichol and Dhariwal 2021 (arXiv 2102.09672), section 3.3. The weight
1 / (T p_t) keeps the mean loss equal to that with uniform times.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from imagen_core.diffusion.schedules import Discrete
from imagen_core.train.config import TrainConfig

_HISTORY = 10  # losses kept per step
_UNIFORM_SHARE = 0.001  # of the probability, spread over all steps, so that each is sampled sometimes


class NoiseLevelSampler:
    """Times of training samples; the same on every process, as all record the same losses in the same order."""

    def __init__(self, config: TrainConfig):
        schedule = self._schedule = config.denoiser.diffusion.schedule
        self.kind = config.noise_levels.kind
        self._early_fraction = config.noise_levels.early_fraction
        steps = schedule.num_steps if isinstance(schedule, Discrete) else 1
        self._losses = torch.zeros(steps, _HISTORY, dtype=torch.float64)  # oldest first
        self._counts = torch.zeros(steps, dtype=torch.int64)
        self._cumulative: Tensor | None = None

    def choose(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """float64 (b,) in [0, 1) -> time of the schedule in [0, 1), and the factor of the loss, both float64 (b,)."""
        if self.kind == "early_only":
            return uniform * self._early_fraction, torch.ones_like(uniform)
        if self.kind == "uniform":
            return uniform, torch.ones_like(uniform)
        probabilities = self.probabilities()
        if self._cumulative is None:
            self._cumulative = probabilities.cumsum(dim=0)
        step = torch.searchsorted(self._cumulative, uniform * self._cumulative[-1], right=True).clamp(
            max=len(probabilities) - 1
        )
        return (step + 0.5) / len(probabilities), 1 / (len(probabilities) * probabilities[step])

    def probabilities(self) -> Tensor:
        """(T,) probability of each step: uniform until all have a full history."""
        count = len(self._counts)
        if bool((self._counts < _HISTORY).any()):
            return torch.full((count,), 1 / count, dtype=torch.float64)
        moments = self._losses.square().mean(dim=1).sqrt()
        if float(moments.sum()) == 0:
            return torch.full((count,), 1 / count, dtype=torch.float64)
        return (1 - _UNIFORM_SHARE) * moments / moments.sum() + _UNIFORM_SHARE / count

    def steps(self, sigma: Tensor) -> Tensor:
        """(b,) noise levels of training -> their steps."""
        assert isinstance(self._schedule, Discrete)
        return self._schedule.step(sigma).round()

    def record(self, losses: Sequence[tuple[int, float]]) -> None:
        """Adds the step and the unweighted loss of each sample of a global batch, in its order."""
        for step, loss in losses:
            row, known = self._losses[step], int(self._counts[step])
            if known == _HISTORY:
                row[:-1] = row[1:].clone()
                known -= 1
            row[known] = loss
            self._counts[step] = known + 1
        self._cumulative = None

    @property
    def learns(self) -> bool:
        """Whether losses change the probabilities of the times."""
        return self.kind == "loss_second_moment"

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"losses": self._losses, "counts": self._counts}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`; tensors of another number of steps are ignored."""
        if tensors["losses"].shape == self._losses.shape:
            self._losses, self._counts = tensors["losses"].clone(), tensors["counts"].clone()
            self._cumulative = None
