"""Runs any encoder of transformers on batches padded to their longest caption."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stages.encoders.base import POOLED
from stages.encoders.recipes.states import LayerStates


class PaddedModel:
    """A model that takes `input_ids` and `attention_mask`; padding is masked, and removed from the result.

    Args:
        states: the layers whose states are wanted; None: as `output` says.
        output: `last_hidden_state`; `penultimate`, the states before the last layer, without a final norm;
            `pooled` or `projected`, one vector per caption: CLIP's state of the end token, and its projection.
    """

    padded = True

    def __init__(self, model: Any, output: str, states: LayerStates | None = None):
        self._model, self._output, self._states = model, output, states
        self._pad_id: int = getattr(model.config, "pad_token_id", None) or 0
        self.pooled = output in POOLED
        self.attention: str = getattr(model.config, "_attn_implementation", None) or "its own"

    def __call__(self, ids: Tensor, lengths: Sequence[int], masked: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """int64 (total,) -> (total, dim), or (captions, dim) if pooled; in the type of the weights.

        Args:
            masked: places [start, stop) of each caption to which no token attends. Where text follows such places,
                positions count the tokens that are attended to.
        """
        batch = pad_sequence(list(ids.split(list(lengths))), batch_first=True, padding_value=self._pad_id)
        places = torch.arange(batch.shape[1], device=ids.device)
        own = places < torch.tensor(lengths, device=ids.device)[:, None]
        attended, options = own, {}
        if masked is not None:
            starts, stops = torch.tensor(masked, device=ids.device).T[:, :, None]
            attended = own & ~((places >= starts) & (places < stops))
            if any(start < stop < length for (start, stop), length in zip(masked, lengths, strict=True)):
                positions = [torch.from_numpy(token_positions(*each)) for each in zip(lengths, masked, strict=True)]
                options["position_ids"] = pad_sequence(positions, batch_first=True).to(ids.device)
        inputs = {"input_ids": batch, "attention_mask": attended.long(), **options}
        if self.pooled:
            result = self._model(**inputs, return_dict=True)
            return result.pooler_output if self._output == "pooled" else result.text_embeds
        return run_model(self._model, self._output, self._states, inputs)[own]


def run_model(model: Any, output: str, states: LayerStates | None, inputs: Mapping[str, Any]) -> Tensor:
    """(batch, length, dim): the states of chosen layers, or as `output` says `last_hidden_state` or `penultimate`."""
    if states is not None:
        return states.run(**inputs, return_dict=True)
    result = model(**inputs, return_dict=True, output_hidden_states=output == "penultimate")
    return result.hidden_states[-2] if output == "penultimate" else result.last_hidden_state


def token_positions(length: int, masked: tuple[int, int]) -> np.ndarray:
    """int64 (length,): the positions of a caption's tokens, some of which are masked.

    Where text follows masked places, positions count the tokens that are attended to.
    """
    places = np.arange(length)
    start, stop = masked
    if not start < stop < length:
        return places
    return np.where(places < start, places, np.maximum(places - (stop - start), max(0, start - 1)))


def count_flops(model_class: Any, config: Any, lengths: Sequence[int], text: Any = None) -> float:
    """FLOPs of the linear layers and of attention's two products, without padding; the model is not loaded.

    Args:
        text: the part of the configuration with width and layers, if not `config` itself.
    """
    with torch.device("meta"):
        model = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    shape = text or config
    width, layers = shape.hidden_size, shape.num_hidden_layers
    return sum(2.0 * weights * length + 4.0 * layers * width * length**2 for length in lengths)
