"""Moving averages of the weights.

Each starts as the plain mean of the weights after every update, and becomes exponential once the mean would decay
slower than its rate: decay(t) = min(rate, t / (t + 1)) for update t = 0, 1, 2 ... So an average is useful early,
when an exponential one would still hold the first random weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from imagen_core.train.parallel.world import local


def decay(rate: float, update: int) -> float:
    """Weight of the average so far at update 0, 1, 2 ..."""
    return min(rate, update / (update + 1))


class WeightAverages:
    """One average of a model's parameters for each rate, in at least float32."""

    def __init__(self, model: nn.Module, rates: tuple[float, ...], device: torch.device | str | None = None):
        """`device`: where the averages are kept; None: with the weights."""
        self.updates = 0
        self._model = model
        self.averages: dict[float, dict[str, Tensor]] = {
            rate: {
                name: local(p).detach().to(device, torch.promote_types(p.dtype, torch.float32), copy=True)
                for name, p in model.named_parameters()
            }
            for rate in rates
        }

    @torch.no_grad()
    def update(self, *, counts: bool = True) -> None:
        """Adds the model's weights. Before the first update that counts, the average is the newest weights."""
        weights = [local(p) for p in self._model.parameters()]
        for rate, average in self.averages.items():
            values = list(average.values())
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                values, [w.to(v) for w, v in zip(weights, values, strict=True)], 1 - decay(rate, self.updates)
            )
        self.updates += counts

    @contextmanager
    def applied(self, rate: float) -> Iterator[None]:
        """Within this block the model has the weights of this average."""
        previous = [local(p).detach().clone() for p in self._model.parameters()]
        _copy_in(self._model, self.averages[rate])
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, values in zip(self._model.parameters(), previous, strict=True):
                    local(parameter).copy_(values)


@torch.no_grad()
def _copy_in(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        local(parameter).copy_(weights[name])
