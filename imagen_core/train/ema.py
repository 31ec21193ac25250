"""Moving averages of the weights.

Each starts as the plain mean of the weights after every update, and becomes exponential once the mean would decay
slower than its rate: decay(t) = min(rate, t / (t + 1)) for update t = 0, 1, 2 ... So an average is useful early,
when an exponential one would still hold the first random weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from imagen_core.train.lora.adapter import saved_parameters
from imagen_core.train.parallel.world import local


def decay(rate: float, update: int) -> float:
    """Weight of the average so far at update 0, 1, 2 ..."""
    return min(rate, update / (update + 1))


class WeightAverages:
    """One average for each rate of a model's parameters, or of its adapter's, in at least float32."""

    def __init__(self, model: nn.Module, rates: tuple[float, ...], device: torch.device | str | None = None):
        """`device`: where the averages are kept; None: with the weights."""
        self.updates = 0
        self._model = model
        self.averages: dict[float, dict[str, Tensor]] = {
            rate: {
                name: local(p).detach().to(device, torch.promote_types(p.dtype, torch.float32), copy=True)
                for name, p in saved_parameters(model).items()
            }
            for rate in rates
        }

    @torch.no_grad()
    def update(self, *, counts: bool = True) -> None:
        """Adds the model's weights. Before the first update that counts, the average is the newest weights."""
        weights = [local(p) for p in saved_parameters(self._model).values()]
        for rate, average in self.averages.items():
            values = list(average.values())
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                values, [w.to(v) for w, v in zip(weights, values, strict=True)], 1 - decay(rate, self.updates)
            )
        self.updates += counts

    @contextmanager
    def applied(self, rate: float) -> Iterator[None]:
        """Within this block the model has the weights of this average."""
        parameters = saved_parameters(self._model)
        previous = {name: local(p).detach().clone() for name, p in parameters.items()}
        _copy_in(parameters, self.averages[rate])
        try:
            yield
        finally:
            _copy_in(parameters, previous)


@torch.no_grad()
def _copy_in(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        local(parameter).copy_(weights[name])
