"""T5's encoder over concatenated captions, so that no matrix product contains padding.

Everything in a transformer except attention works on single tokens, whichever caption a token belongs to. So the
captions of a batch are one long row of tokens; only attention separates them, with one call for all captions of the
same length. The weights come from a model that transformers has loaded; the architecture is Raffel et al. 2020
(arXiv 1910.10683): pre-norm, RMS norm, relative position bias, no scaling of the scores, plain or gated feed-forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Block:
    """The weights of one layer; products with the same input are one product. `out` and `ff_out` are transposed."""

    norm: Any
    qkv: Tensor
    out: Tensor
    relative: Any
    """The attention that has a table of position biases; the first layer's where a layer has none."""
    ff_norm: Any
    ff_in: Tensor
    ff_out: Tensor


class PackedT5:
    """The encoder of a `T5EncoderModel` (T5, v1.1, mT5, ByT5, umT5) without padding.

    Takes the model apart: weights that are joined here are removed from it, so that none is in memory twice.
    """

    padded = pooled = False
    attention = "sdpa"

    def __init__(self, model: Any):
        config = model.config
        self._heads: int = config.num_heads
        self._gated: bool = config.is_gated_act
        self._embed = model.get_input_embeddings()
        self._final_norm = model.encoder.final_layer_norm
        self._blocks: list[_Block] = []
        self._biases: dict[int, Tensor] = {}
        self._activation: Callable[[Tensor], Tensor]
        for block in model.encoder.block:
            attention, feed_forward = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
            relative = attention if attention.has_relative_attention_bias else self._blocks[0].relative
            self._activation = _gelu_ if config.dense_act_fn == "gelu_new" else feed_forward.act
            self._blocks.append(
                _Block(
                    norm=block.layer[0].layer_norm,
                    qkv=_joined(attention, "q", "k", "v"),
                    out=attention.o.weight.T,
                    relative=relative,
                    ff_norm=block.layer[1].layer_norm,
                    ff_in=_joined(feed_forward, "wi_0", "wi_1") if self._gated else feed_forward.wi.weight,
                    ff_out=feed_forward.wo.weight.T,
                )
            )

    def __call__(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """The last hidden states.

        Args:
            ids: int64 (total,), the tokens of all captions one after another.
            lengths: number of tokens of each caption; equal lengths should be adjacent, to share a call of attention.
        Returns:
            (total, dim), in the dtype of the weights.
        """
        groups = [(length, len(list(same))) for length, same in groupby(lengths)]
        x = self._embed(ids)
        first = self._blocks[0]
        qkv, hidden = (x.new_empty(len(x), len(weight)) for weight in (first.qkv, first.ff_in))  # for all layers
        for block in self._blocks:
            torch.mm(_normalised(x, block.norm), block.qkv.T, out=qkv)
            x.addmm_(self._attend(qkv, groups, block.relative), block.out)
            torch.mm(_normalised(x, block.ff_norm), block.ff_in.T, out=hidden)
            x.addmm_(self._activate(hidden), block.ff_out)
        return _normalised(x, self._final_norm)

    def _attend(self, qkv: Tensor, groups: Sequence[tuple[int, int]], relative: Any) -> Tensor:
        """(total, 3 x inner) -> (total, inner): each caption attends to itself. The result overwrites the queries."""
        inner = qkv.shape[1] // 3
        bias = self._bias(relative, max(length for length, _ in groups))
        start = 0
        for length, count in groups:
            rows = qkv[start : start + length * count]
            query, key, value = rows.view(count, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
            mask = bias[:, :, :length, :length].expand(count, -1, -1, -1)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
            rows[:, :inner].view(count, length, self._heads, -1).copy_(attended.transpose(1, 2))
            start += length * count
        return qkv[:, :inner]

    def _bias(self, relative: Any, length: int) -> Tensor:
        """(1, heads, >= length, >= length). A bias depends only on the distance: the largest table has all others.

        Its sides are a multiple of 8, which fast kernels require of a mask's rows.
        """
        known = self._biases.get(id(relative))
        if known is None or known.shape[-1] < length:
            side = -(-length // 8) * 8
            known = self._biases[id(relative)] = relative.compute_bias(side, side).contiguous()
        return known

    def _activate(self, hidden: Tensor) -> Tensor:
        if not self._gated:
            return self._activation(hidden)
        gate, linear = hidden.chunk(2, dim=-1)
        return self._activation(gate).mul_(linear)


def _joined(module: Any, *names: str) -> Tensor:
    """The weights of several linear layers as one matrix; they are removed from the module."""
    weight = torch.cat([getattr(module, name).weight for name in names])
    for name in names:
        delattr(module, name)
    return weight


def _normalised(x: Tensor, norm: Any) -> Tensor:
    """RMS norm; the mean of squares in float32, as in T5."""
    return F.rms_norm(x, (x.shape[-1],), None, norm.variance_epsilon).mul_(norm.weight)


def _gelu_(x: Tensor) -> Tensor:
    """In place."""
    return torch.ops.aten.gelu_(x, approximate="tanh")
