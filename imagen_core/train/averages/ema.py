"""Moving averages of the weights.

An average by rate starts as the plain mean of the weights after every update, and becomes exponential once the mean
would decay slower than its rate: decay(t) = min(rate, t / (t + 1)) for update t = 0, 1, 2 ... So it is useful early,
when an exponential one would still hold the first random weights. Averages by profile are those of `power`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from imagen_core.train.averages.power import exponent_of, power_decay, power_name
from imagen_core.train.lora.adapter import saved_parameters
from imagen_core.train.parallel.world import local


def decay(rate: float, update: int) -> float:
    """Weight of the average so far at update 0, 1, 2 ..."""
    return min(rate, update / (update + 1))


class WeightAverages:
    """Averages of a model's parameters, or of its adapter's, in at least float32; one for each rate and profile."""

    def __init__(
        self,
        model: nn.Module,
        rates: tuple[float, ...],
        device: torch.device | str | None = None,
        profiles: tuple[float, ...] = (),
    ):
        """
        Args:
            device: where the averages are kept; None: with the weights.
            profiles: sigma_rel of each power-function average.
        """
        self.updates = 0
        self.since = 0
        """Updates after which the averages by profile began; what was before counts as the weights of then."""
        self._model = model
        self._decays: dict[str, Callable[[int], float]] = {f"ema-{rate}": partial(decay, rate) for rate in rates}
        self._decays |= {power_name(each): partial(power_decay, exponent_of(each)) for each in profiles}
        self.by_profile = tuple(map(power_name, profiles))
        """Names of the averages by profile."""
        self.averages: dict[str, dict[str, Tensor]] = {
            average: {
                name: local(p).detach().to(device, torch.promote_types(p.dtype, torch.float32), copy=True)
                for name, p in saved_parameters(model).items()
            }
            for average in self._decays
        }
        """Tensors by parameter, by the average's name: ema-RATE or power-SIGMA_REL."""
        longest = [f"ema-{max(rates)}"] if rates else []
        longest += [power_name(max(profiles))] if profiles else []
        self.slowest = next(iter(longest), None)
        """Name of the average that stands for the model in validation; None without averages."""

    @torch.no_grad()
    def update(self, *, counts: bool = True) -> None:
        """Adds the model's weights. Before the first update that counts, the average is the newest weights."""
        weights = [local(p) for p in saved_parameters(self._model).values()]
        for name, average in self.averages.items():
            values = list(average.values())
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                values, [w.to(v) for w, v in zip(weights, values, strict=True)], 1 - self._decays[name](self.updates)
            )
        self.updates += counts

    @contextmanager
    def applied(self, average: str) -> Iterator[None]:
        """Within this block the model has the weights of the average of this name."""
        parameters = saved_parameters(self._model)
        previous = {name: local(p).detach().clone() for name, p in parameters.items()}
        _copy_in(parameters, self.averages[average])
        try:
            yield
        finally:
            _copy_in(parameters, previous)


@torch.no_grad()
def _copy_in(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        local(parameter).copy_(weights[name])
