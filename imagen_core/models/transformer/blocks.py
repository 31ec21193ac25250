"""The block of the patch transformer: attention and a gated feed-forward layer, shifted, scaled and gated by time.

Shapes: b batch, n tokens of the sequence, l tokens of conditions, d width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.layers.attention import masked_attention
from imagen_core.models.layers.gated import Gated
from imagen_core.models.layers.positions import rotate_pairs
from imagen_core.models.layers.rms_norm import RMSNorm
from imagen_core.models.transformer.config import TransformerSettings

NUM_MODULATIONS = 6
"""Shift, scale and gate of attention, then of the feed-forward layer."""


@dataclass(frozen=True, slots=True)
class TokenContext:
    """What every block reads in addition to the tokens.

    Attributes:
        time: the activated time vector (b, dim) that a block projects; its projection (b, 6 * dim) where all blocks
            share one; None where the time is a token.
        cos, sin: (n, d / 2), of the rotary positions: 1 and 0 for tokens without a place.
        tokens: (b, l, dim), the conditions to attend to; None without.
        mask: bool (b, l), true on real ones; None if all are real.
    """

    time: Tensor | None
    cos: Tensor
    sin: Tensor
    tokens: Tensor | None
    mask: Tensor | None


class TokenAttention(nn.Module):
    """Multi-head attention with rotary positions, of tokens on themselves (self), on conditions (cross), or on both
    as one sequence (fused). Conditions have no position.

    A row whose conditions are all masked attends to its own tokens (fused), or gets zero (cross).
    """

    def __init__(self, config: TransformerSettings, kind: str):
        """`kind`: self, cross or fused."""
        super().__init__()
        dim, bias = config.dim, config.bias
        head_dim = dim // config.num_heads

        def norm() -> nn.Module:
            return RMSNorm(head_dim) if config.qk_norm else nn.Identity()

        self.head_dim = head_dim
        self.to_q, self.norm_q = nn.Linear(dim, dim, bias=bias), norm()
        self.to_kv = self.norm_k = self.context_to_kv = self.norm_context_k = None
        if kind != "cross":
            self.to_kv, self.norm_k = nn.Linear(dim, 2 * dim, bias=bias), norm()
        if kind != "self":
            self.context_to_kv, self.norm_context_k = nn.Linear(dim, 2 * dim, bias=bias), norm()
        self.to_out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, context: TokenContext) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        q = self.norm_q(self._heads(self.to_q(x), 1)[0])
        keys: list[Tensor] = []
        values: list[Tensor] = []
        num_own = 0
        if self.to_kv is not None and self.norm_k is not None:
            k, v = self._heads(self.to_kv(x), 2)
            q, num_own = rotate_pairs(q, context.cos, context.sin), x.shape[1]
            keys.append(rotate_pairs(self.norm_k(k), context.cos, context.sin).to(v.dtype))
            values.append(v)
        mask = None
        if self.context_to_kv is not None and self.norm_context_k is not None:
            assert context.tokens is not None
            mask = context.mask
            k, v = self._heads(self.context_to_kv(context.tokens), 2)
            keys.append(self.norm_context_k(k).to(v.dtype))
            values.append(v)
        k, v = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) for parts in (keys, values))
        q = q.to(v.dtype)
        if mask is None:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            attended = masked_attention(q, k, v, mask, num_own, None)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, count: int) -> Tensor:
        """(b, n, count * dim) -> (count, b, heads, n, d)."""
        return x.unflatten(-1, (count, -1, self.head_dim)).permute(2, 0, 3, 1, 4)


class PatchBlock(nn.Module):
    """Attention, attention to conditions (cross alone), and a gated feed-forward layer, each on normalised tokens and
    with a residual; a new block adds nothing."""

    def __init__(self, config: TransformerSettings, *, dropout: float):
        super().__init__()
        dim, conditions = config.dim, config.attention_type
        self.norm = make_norm(config)
        self.attention = TokenAttention(config, "self" if conditions == "cross" else conditions)
        self.norm_cross = self.cross_attention = None
        if conditions == "cross":
            self.norm_cross, self.cross_attention = make_norm(config, gains=True), TokenAttention(config, "cross")
        self.norm_mlp = make_norm(config)
        self.expand = nn.Linear(dim, 2 * config.mlp_dim, bias=config.bias)
        self.gated = Gated(config.mlp_activation)
        self.contract = nn.Linear(config.mlp_dim, dim, bias=config.bias)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(dim, NUM_MODULATIONS * dim) if config.time == "adaptive" else None
        self.offset = nn.Parameter(torch.zeros(NUM_MODULATIONS * dim)) if config.time == "shared" else None

    def forward(self, x: Tensor, context: TokenContext) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        modulations: list[Tensor | None] = [None] * NUM_MODULATIONS
        if context.time is not None:
            values = context.time
            if self.modulation is not None:
                values = self.modulation(values)
            elif self.offset is not None:
                values = values + self.offset
            modulations = list(values[:, None].chunk(NUM_MODULATIONS, dim=-1))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulations
        attended = self.dropout(self.attention(modulate(self.norm(x), shift, scale), context))
        x = x + (attended if gate is None else gate * attended)
        if self.cross_attention is not None and self.norm_cross is not None:
            x = x + self.dropout(self.cross_attention(self.norm_cross(x), context))
        hidden = self.dropout(self.gated(self.expand(modulate(self.norm_mlp(x), mlp_shift, mlp_scale))))
        hidden = self.contract(hidden)
        return x + (hidden if mlp_gate is None else mlp_gate * hidden)


def make_norm(config: TransformerSettings, *, gains: bool = False) -> nn.Module:
    """The norm of the tokens; layer norm has `gains` only where they are asked for, or nothing else would scale it."""
    if config.norm == "rms":
        return RMSNorm(config.dim)
    return nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=gains or config.time == "token")


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """x (b, n, dim), scaled by 1 + scale and shifted, both (b, 1, dim); as it is without them."""
    return x if shift is None or scale is None else torch.addcmul(shift, x, 1 + scale)
