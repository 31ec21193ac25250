"""The states of chosen layers of a model of transformers."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import ConfigError, MachineError

_LAYER_LISTS = ("layers", "block", "layer", "h", "encoder.block", "encoder.layers", "encoder.layer")
_EPSILON = 1e-6


def chosen_layers(layers: Sequence[int | str], num_layers: int, where: str) -> list[int]:
    """Indices into `hidden_states`, from 0 (embeddings) to the number of layers.

    Raises:
        ConfigError: one is out of range, or a slice is empty.
    """
    found: list[int] = []
    for item in layers:
        if isinstance(item, str):
            chosen = range(num_layers + 1)[slice(*(int(part) if part else None for part in item.split(":")))]
        else:
            chosen = [item + num_layers + 1 if item < 0 else item]
        if not chosen or not all(0 <= index <= num_layers for index in chosen):
            raise ConfigError(
                f"{where}.layers: {item}: the model has {num_layers} layers; give indices from 0 (embeddings) to "
                f"{num_layers}, or from {-num_layers - 1} to -1"
            )
        found += chosen
    return found


class LayerStates:
    """Runs a model and catches the states of some layers; layers above the highest one are taken out of it.

    Args:
        model: of transformers; its list of layers is changed.
        layers: indices into `hidden_states`, in the order in which they are joined.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[int],
        final_norm: bool | Literal["rms"],
        join: Literal["concat", "interleave", "stack"],
    ):
        modules = _layer_list(model)
        self._model = model
        self._layers, self._join, self._rms = layers, join, final_norm == "rms"
        self._last = len(modules) if final_norm is True else None
        self._caught: dict[int, Tensor] = {}
        del modules[max(1, *layers) :]
        for index in set(layers) - {0, self._last}:
            modules[index - 1].register_forward_hook(self._catcher(index))
        if 0 in layers:
            modules[0].register_forward_pre_hook(self._catch_embeddings, with_kwargs=True)

    def run(self, **inputs: Any) -> Tensor:
        """(batch, length, width of all layers) of the model's inputs."""
        try:
            result = self._model(**inputs)
            if self._last is not None:
                self._caught[self._last] = result.last_hidden_state
            return self._joined([self._caught[index] for index in self._layers])
        finally:
            self._caught.clear()  # also where memory was short

    def _joined(self, states: Sequence[Tensor]) -> Tensor:
        if self._rms:
            states = [_without_scale(state) for state in states]
        if len(states) == 1:
            return states[0]
        return torch.stack(list(states), -1).flatten(-2) if self._join == "interleave" else torch.cat(list(states), -1)

    def _catcher(self, index: int) -> Any:
        def catch(module: Any, arguments: Any, output: Any) -> None:
            self._caught[index] = output[0] if isinstance(output, tuple) else output

        return catch

    def _catch_embeddings(self, module: Any, arguments: Any, named: Any) -> None:
        self._caught[0] = (arguments[0] if arguments else named["hidden_states"]).clone()


def _without_scale(state: Tensor) -> Tensor:
    """Each row divided by its root mean square, in float32."""
    wide = state.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)).to(state.dtype)


def _layer_list(model: Any) -> Any:
    for path in _LAYER_LISTS:
        found = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, torch.nn.ModuleList):
            return found
    raise MachineError(
        f"encoders.model: the layers of a {type(model).__name__} are not known; leave out layers and final_norm"
    )
