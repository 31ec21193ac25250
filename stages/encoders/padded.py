"""Any encoder of transformers over batches padded to their longest caption."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

STATES = ("last_hidden_state", "penultimate")
POOLED = ("pooled", "projected")


class PaddedModel:
    """A model that takes `input_ids` and `attention_mask`; padding is masked, and taken out of the result.

    Args:
        output: `last_hidden_state`; `penultimate`, the states before the last layer, without a final norm;
            `pooled` or `projected`, one vector a caption: CLIP's state of the end token, and its projection.
    """

    padded = True

    def __init__(self, model: Any, output: str):
        self._model, self._output = model, output
        self._pad_id: int = getattr(model.config, "pad_token_id", None) or 0
        self.pooled = output in POOLED

    def __call__(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """int64 (total,) -> (total, dim), or (captions, dim) if pooled; in the type of the weights."""
        batch = pad_sequence(list(ids.split(list(lengths))), batch_first=True, padding_value=self._pad_id)
        places = torch.arange(batch.shape[1], device=ids.device)
        mask = places < torch.tensor(lengths, device=ids.device)[:, None]
        result = self._model(
            input_ids=batch,
            attention_mask=mask.long(),
            output_hidden_states=self._output == "penultimate",
            return_dict=True,
        )
        if self._output == "pooled":
            return result.pooler_output
        if self._output == "projected":
            return result.text_embeds
        states = result.hidden_states[-2] if self._output == "penultimate" else result.last_hidden_state
        return states[mask]
