"""Language models over concatenated captions: no product contains padding, and shared first tokens are run once.

Everything in a decoder except attention works on single tokens, so the captions of a batch are one row of tokens for
transformers' own classes. These look up attention by name; the one registered here lets a token attend to its own
caption, as far as the model's mask would, and to the keys and values of the tokens that all captions begin with, which
are computed once (`share`). That is exact where attention is causal: no state depends on tokens behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from stages.encoders.padded import run_model, token_positions
from stages.encoders.recipes.states import LayerStates

FAMILIES = frozenset(
    (
        *("llama", "mistral", "ministral3", "smollm3", "granite", "olmo2"),
        *("qwen2", "qwen3", "qwen2_5_vl_text", "qwen3_vl_text", "glm", "glm4"),
        *("gemma", "gemma2", "gemma3_text"),
    )
)
"""Types of models whose tokens meet in attention alone, which is causal; each is compared with its padded form by the
tests. A type that is not listed runs padded."""
_ATTENTION = "packed_captions"
_CHUNK_ON_CPU, _CHUNK_ON_GPU = 128, 512
"""Tokens of short captions that attend in one call."""
_ALIGNED = 16
"""Fast kernels require that a mask's rows begin at a multiple of this."""

KeysAndValues = tuple[Tensor, Tensor]


def is_packable(config: Any) -> bool:
    """Whether captions can be concatenated for a text model of transformers with this configuration."""
    is_causal = getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)
    return config.model_type in FAMILIES and bool(is_causal)


@dataclass(slots=True)
class _Packing:
    """What attention knows of the tokens of one row."""

    chunks: list[tuple[int, int, bool]]
    """Captions that attend in one call: first token, end, and whether the shared tokens stand before each."""
    caption: Tensor
    """int (total,): the number of the caption that a token belongs to."""
    place: Tensor
    """int (total,): the place of a token in its caption, shared tokens included."""
    attended: Tensor
    """bool (total,): whether any token may attend to a token."""
    longest: int
    """Tokens of the longest caption, shared ones included."""
    kept: dict[int, KeysAndValues]
    """By layer: (heads, shared, head_dim) of the shared tokens."""
    num_shared: int
    keeps: bool
    """Whether the row is the shared tokens, whose keys and values are to be kept."""
    masks: dict[int | None, list[Tensor]] = field(default_factory=dict)
    """By sliding window: what is added to the scores of each chunk, (length, shared + length)."""

    def masks_of(self, window: int | None, dtype: torch.dtype) -> list[Tensor]:
        if window is not None and window >= self.longest:
            window = None
        if window not in self.masks:
            self.masks[window] = [self._mask(*chunk, window, dtype) for chunk in self.chunks]
        return self.masks[window]

    def _mask(self, start: int, stop: int, shares: bool, window: int | None, dtype: torch.dtype) -> Tensor:
        caption, place = self.caption[start:stop], self.place[start:stop]
        num_shared = self.num_shared if shares else 0
        before = torch.arange(num_shared, device=place.device)
        distance = place[:, None] - torch.cat([before, place])
        allowed = distance >= 0
        if window is not None:
            allowed &= distance < window
        own = allowed[:, num_shared:]
        own &= (caption[:, None] == caption) & self.attended[start:stop]
        if window is not None:  # all that padding would see may be padding
            own.diagonal().logical_or_(~allowed.any(1))
        length, keys = allowed.shape
        rows = torch.full((length, -(-keys // _ALIGNED) * _ALIGNED), -torch.inf, dtype=dtype, device=place.device)
        return rows[:, :keys].masked_fill_(allowed, 0.0)


class PackedDecoder:
    """A language model of one of the `FAMILIES` without padding.

    Args:
        output, states: as for `PaddedModel`.
    """

    padded = pooled = False

    def __init__(self, model: Any, output: str, states: LayerStates | None = None):
        self._model, self._output, self._states = model, output, states
        self.attention: str = model.config._attn_implementation
        model.set_attn_implementation(_ATTENTION)
        self._kept: dict[int, KeysAndValues] = {}
        self._num_shared = 0

    def share(self, ids: Tensor) -> Tensor:
        """Keeps the keys and values of tokens that captions begin with.

        int64 (shared,) -> their states (shared, dim), in the type of the weights.
        """
        kept: dict[int, KeysAndValues] = {}
        states = self._run(ids, [len(ids)], None, None, kept)
        self._kept, self._num_shared = kept, len(ids)
        return states

    def __call__(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        masked: Sequence[tuple[int, int]] | None = None,
        shares: Sequence[bool] | None = None,
    ) -> Tensor:
        """int64 (total,) -> (total, dim), in the type of the weights.

        Args:
            masked: as for `PaddedModel`; places count shared tokens.
            shares: whether the shared tokens stand before the tokens of each caption; None: before none.
        """
        return self._run(ids, lengths, masked, shares, None)

    def _run(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        masked: Sequence[tuple[int, int]] | None,
        shares: Sequence[bool] | None,
        keep: dict[int, KeysAndValues] | None,
    ) -> Tensor:
        on_cpu = ids.device.type == "cpu"
        before = np.where(shares, self._num_shared, 0) if shares is not None else np.zeros(len(lengths), np.int64)
        starts = np.cumsum(lengths) - lengths
        captions = np.repeat(np.arange(len(lengths)), lengths)
        places = np.arange(len(ids)) + (before - starts)[captions]
        positions, attended = places.copy(), np.ones_like(places)
        for start, length, first, span in zip(starts, lengths, before, masked or (), strict=masked is not None):
            positions[start : start + length] = token_positions(int(first) + length, span)[first:]
            attended[start + span[0] - first : start + span[1] - first] = 0
        each = torch.from_numpy(np.stack([captions, places, positions, attended]))
        of_tokens = (each if on_cpu else each.pin_memory()).to(ids.device, non_blocking=True)
        packing = _Packing(
            chunks=_chunks(lengths, before > 0, _CHUNK_ON_CPU if on_cpu else _CHUNK_ON_GPU),
            caption=of_tokens[0],
            place=of_tokens[1],
            attended=of_tokens[3].bool(),
            longest=int(places.max()) + 1,
            kept=self._kept if keep is None else keep,
            num_shared=self._num_shared,
            keeps=keep is not None,
        )
        inputs = {"input_ids": ids[None], "position_ids": of_tokens[2:3], "use_cache": False, "packing": packing}
        return run_model(self._model, self._output, self._states, inputs)[0]


def _chunks(lengths: Sequence[int], shares: np.ndarray, most: int) -> list[tuple[int, int, bool]]:
    """Adjacent captions as ranges of tokens of at most `most`, or one caption; those of a range all share, or none."""
    ends = [0, *np.cumsum(lengths).tolist()]
    chunks: list[tuple[int, int, bool]] = []
    for (start, stop), shared in zip(pairwise(ends), shares.tolist(), strict=True):
        if chunks and chunks[-1][2] == shared and stop - chunks[-1][0] <= most:
            chunks[-1] = (chunks[-1][0], stop, shared)
        else:
            chunks.append((start, stop, shared))
    return chunks


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packing: _Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (1, heads, total, head_dim) -> (1, total, heads, head_dim).

    A head of keys and values serves a group of heads of queries without being repeated.
    """
    _, heads, total, _ = query.shape
    groups = key.shape[1]
    if packing.keeps:
        packing.kept[module.layer_idx] = key[0].contiguous(), value[0].contiguous()
    result = query.new_empty(total, groups, heads // groups, value.shape[-1])
    masks = packing.masks_of(sliding_window, query.dtype)
    for (start, stop, shares), mask in zip(packing.chunks, masks, strict=True):
        q = query[0, :, start:stop].unflatten(0, (groups, -1))
        k, v = key[0, :, start:stop], value[0, :, start:stop]
        if shares:
            k, v = (torch.cat(pair, 1) for pair in zip(packing.kept[module.layer_idx], (k, v), strict=True))
        k, v = (each[:, None].expand(-1, heads // groups, -1, -1) for each in (k, v))
        if softcap is None:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        else:
            attended = _softcapped(q, k, v, mask, scaling, softcap)
        result[start:stop] = attended.permute(2, 0, 1, 3)
    return result.view(1, total, heads, -1), None


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float) -> Tensor:
    """Attention with bounded scores (Gemma 2, arXiv 2408.00118, section 2.1); softmax in float32."""
    scores = q @ k.transpose(2, 3)
    scores = scores.mul_((q.shape[-1] ** -0.5 if scaling is None else scaling) / softcap).tanh_().mul_(softcap)
    return scores.add_(mask).softmax(-1, dtype=torch.float32).to(v.dtype) @ v


AttentionInterface.register(_ATTENTION, _attend)
