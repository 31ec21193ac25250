"""The attention module of all models, on `scaled_dot_product_attention`.

Shapes: b batch, c channels, h w height and width, n = h * w pixels, l tokens of text, d width of a head.
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.layers.cpu import scaled_unit
from imagen_core.models.layers.gated import Gated

ModuleT = TypeVar("ModuleT", bound=nn.Module)
AttentionKind = Literal["self", "cross", "fused"]


class Attention(nn.Module):
    """Multi-head attention of queries on themselves, on a context, or on both at once.

    self: keys and values come from the queries' own sequence. cross: from the context. fused: from both,
    joined into one sequence (Imagen's text conditioning; NeMo calls it fused attention).

    A row whose context is all masked attends to its own sequence (fused), to the null key, or, with neither, gets
    zero: finite in value and gradient in every precision.
    """

    def __init__(
        self,
        dim: int,
        *,
        kind: AttentionKind,
        num_heads: int,
        head_dim: int,
        context_dim: int | None = None,
        num_kv_heads: int | None = None,
        bias: bool = True,
        null_kv: bool = False,
        context_bias: bool | None = None,
        qk_norm: bool | float = False,
        linear: bool = False,
        causal: bool = False,
    ):
        """
        Args:
            dim: width of the queries and of the result.
            linear: instead of softmax(q k) v, softmax(q) (softmax(k) v), over features and over keys: linearly many
                operations in the number of keys (Shen et al. 2018, arXiv 1812.01243, equation 6).
            context_bias: bias on the context's keys and values; None means `bias`.
            qk_norm: True for cosine similarity: queries and keys have unit length and learned gains, and logits are
                scaled by 8. A number scales the logits by it, without gains.
            causal: a query sees the null key and the sequence's own keys up to its position.
            num_kv_heads: heads of keys and values; 1 is multi-query attention (Shazeer 2019). None means num_heads.
            null_kv: adds one learned key and value of head_dim each, never masked.
        Raises:
            ValueError: cross or fused attention without context_dim.
        """
        super().__init__()
        if kind != "self" and context_dim is None:
            raise ValueError(f"{kind} attention needs context_dim")
        self.kind, self.num_heads, self.head_dim, self.linear = kind, num_heads, head_dim, linear
        self.num_kv_heads = num_kv_heads or num_heads
        inner, kv_inner = num_heads * head_dim, self.num_kv_heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_kv = nn.Linear(dim, 2 * kv_inner, bias=bias) if kind != "cross" else None
        self.context_to_kv = (
            nn.Linear(context_dim or 0, 2 * kv_inner, bias=bias if context_bias is None else context_bias)
            if kind != "self"
            else None
        )
        self.null_kv = nn.Parameter(torch.randn(2, head_dim)) if null_kv else None
        self.causal, self.cosine_scale = causal, (8.0 if qk_norm is True else float(qk_norm) or None)
        self.qk_gains = nn.Parameter(torch.ones(2, head_dim)) if qk_norm is True else None
        self.to_out = nn.Linear(inner, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        keys_from: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        rotary: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (b, n, dim) queries.
            context: (b, l, context_dim), for cross and fused.
            mask: bool (b, l), true where the context is real; None if it is real everywhere.
            keys_from: (b, n, dim), the source of the sequence's own keys and values; None means x.
            bias: added to the logits of self attention; broadcasts to (b, heads, n, n), with a last axis of n, or of
                n + 1 if it includes the null key.
            rotary: applied to the queries and the sequence's own keys (b, heads, n, d), in self attention.
        Returns:
            (b, n, dim).
        """
        kv: list[Tensor] = []
        if self.to_kv is not None:
            kv.append(self.to_kv(x if keys_from is None else keys_from))
        if self.context_to_kv is not None:
            assert context is not None
            kv.append(self.context_to_kv(context))
        num_own = 0 if self.to_kv is None else x.shape[1]
        k, v = torch.cat(kv, dim=1).unflatten(-1, (2, self.num_kv_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q = self.to_q(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (b, heads, n, d)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        if self.null_kv is not None:
            null = self.null_kv.to(k.dtype)[:, None, None, None].expand(2, k.shape[0], k.shape[1], 1, -1)
            k, v = torch.cat([null[0], k], dim=2), torch.cat([null[1], v], dim=2)
            num_own += 1
        if self.qk_gains is not None:
            q, k = scaled_unit(q, self.qk_gains[0]), scaled_unit(k, self.qk_gains[1])
        elif self.cosine_scale is not None:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.num_kv_heads != self.num_heads:
            k, v = (t.expand(-1, self.num_heads, -1, -1) for t in (k, v))
        mask = None if self.context_to_kv is None else mask
        if self.linear:
            attended = _linear_attention(q, k, v, mask, num_own)
        elif mask is None:
            logits = self._own_logits(q, k.shape[2], bias)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=logits, scale=self.cosine_scale)
        else:
            attended = masked_attention(q, k, v, mask, num_own, self.cosine_scale)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def _own_logits(self, q: Tensor, num_keys: int, bias: Tensor | None) -> Tensor | None:
        """Added to the logits (..., n, m) of self attention: the bias, and minus infinity at later positions."""
        if bias is None and not self.causal:
            return None
        num_queries = q.shape[2]
        logits = q.new_zeros(1, num_queries, num_keys)
        if bias is not None:
            logits = F.pad(bias.to(q.dtype), (num_keys - bias.shape[-1], 0))
        if self.causal:
            ahead = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
            logits = logits.masked_fill(ahead.triu(num_keys - num_queries + 1), -torch.inf)
        return logits


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, num_own: int, scale: float | None) -> Tensor:
    """Attention with a mask on the context, which follows `num_own` keys that are never masked."""
    if num_own:
        full = F.pad(mask, (num_own, 0), value=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=full[:, None, None, :], scale=scale)
    none_left = ~mask.any(dim=-1, keepdim=True)  # softmax over no keys is NaN: attend to all, then zero it
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=(mask | none_left)[:, None, None, :], scale=scale)
    return attended.masked_fill(none_left[:, :, None, None], 0)


def _linear_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, num_own: int) -> Tensor:
    """All (b, heads, n or m, d); the mask is on the context, which follows `num_own` keys that are never masked."""
    if mask is not None:
        real = F.pad(mask, (num_own, 0), value=True)[:, None, :, None]
        k, v = k.masked_fill(~real, torch.finfo(k.dtype).min), v.masked_fill(~real, 0)
    values = k.softmax(dim=-2).transpose(-1, -2) @ v  # (b, heads, d, d)
    return (q.softmax(dim=-1) * q.shape[-1] ** -0.5) @ values


class TokenGroupNorm(nn.GroupNorm):
    """Group norm of a context: groups of channels have one mean and variance over all tokens, padding too."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, l, c) -> (b, l, c)."""
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class PixelAttention(nn.Module):
    """Attention over the pixels of an image with norms and a residual; a new layer adds zero."""

    def __init__(
        self,
        dim: int,
        *,
        kind: AttentionKind,
        head_dim: int,
        context_dim: int | None = None,
        num_groups: int = 32,
        group_context: bool = False,
        shared_norm: bool = False,
    ):
        """
        Args:
            shared_norm: fused attention has one norm for queries and the pixels' keys; otherwise a norm for each.
            group_context: normalise the context by `TokenGroupNorm`; otherwise each token by layer norm.
        Raises:
            ValueError: dim is not a multiple of head_dim.
        """
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"attention: {dim} channels are not a multiple of head_dim {head_dim}")
        self.norm = nn.GroupNorm(num_groups, dim)
        self.norm_keys = nn.GroupNorm(num_groups, dim) if kind == "fused" and not shared_norm else None
        self.norm_context = None
        if kind != "self":
            width = context_dim or 0
            self.norm_context = TokenGroupNorm(num_groups, width) if group_context else nn.LayerNorm(width)
        self.attention = Attention(
            dim, kind=kind, num_heads=dim // head_dim, head_dim=head_dim, context_dim=context_dim
        )
        zero_(self.attention.to_out)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w); context (b, l, context_dim) and its bool mask (b, l)."""
        keys = None if self.norm_keys is None else flatten_pixels(self.norm_keys(x))
        if self.norm_context is not None and context is not None:
            context = self.norm_context(context)
        attended = self.attention(flatten_pixels(self.norm(x)), context, mask, keys)
        return x + unflatten_pixels(attended, x)


class FeedForward(nn.Module):
    """Norm, linear, GEGLU, linear, with a residual, on pixels."""

    def __init__(self, dim: int, multiplier: int = 4, num_groups: int = 32):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, dim)
        self.expand = nn.Linear(dim, 2 * multiplier * dim)
        self.gated = Gated("geglu")
        self.contract = nn.Linear(multiplier * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        return x + unflatten_pixels(self.contract(self.gated(self.expand(flatten_pixels(self.norm(x))))), x)


class StackedAttention(nn.Module):
    """A transformer block between two projections: self attention, cross attention, feed-forward; with a residual."""

    def __init__(
        self, dim: int, *, head_dim: int, context_dim: int, num_groups: int = 32, group_context: bool = False
    ):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, dim)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.self_attention = PixelAttention(dim, kind="self", head_dim=head_dim, num_groups=num_groups)
        self.cross_attention = PixelAttention(
            dim,
            kind="cross",
            head_dim=head_dim,
            context_dim=context_dim,
            num_groups=num_groups,
            group_context=group_context,
        )
        self.feed_forward = FeedForward(dim, num_groups=num_groups)
        self.proj_out = zero_(nn.Conv2d(dim, dim, 1))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w); context (b, l, context_dim) and its bool mask (b, l)."""
        h = self.self_attention(self.proj_in(self.norm(x)))
        h = self.feed_forward(self.cross_attention(h, context, mask))
        return x + self.proj_out(h)


def flatten_pixels(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h * w, c); a contiguous view if x is channels-last."""
    return x.flatten(2).transpose(1, 2)


def unflatten_pixels(tokens: Tensor, like: Tensor) -> Tensor:
    """(b, h * w, c) -> (b, c, h, w) with the height and width of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def zero_(module: ModuleT) -> ModuleT:
    """Sets all parameters of a layer to zero and returns it; a new residual branch that ends with it adds nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module
