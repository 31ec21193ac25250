"""The transformer layer of all token models: attention, then a feed-forward layer, both with residuals."""

from typing import Literal

from torch import Tensor, nn

from imagen_core.models.layers.attention import Attention
from imagen_core.models.layers.gated import Gated
from imagen_core.models.layers.positions import Rotary

Activation = Literal["gelu", "geglu", "swiglu"]


class TransformerLayer(nn.Module):
    """Norm, attention of tokens on themselves (and on a context), norm; then a feed-forward layer.

    Multi-query attention with a learned null key and no biases, as in the Hybrid UNets and DALL-E 2's prior.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int = 1,
        ff_mult: int,
        context_dim: int | None = None,
        activation: Activation = "gelu",
        ff_norm: bool = True,
        qk_norm: bool | float = False,
        linear: bool = False,
        causal: bool = False,
        dropout: float = 0.0,
    ):
        """
        Args:
            ff_mult: width of the feed-forward layer in units of `width`; 0 for attention alone.
            context_dim: width of a context to attend to in addition to the tokens; None without one.
            ff_norm: a norm within the feed-forward layer.
        """
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.norm_context = nn.LayerNorm(context_dim) if context_dim is not None else None
        self.attention = Attention(
            width,
            kind="self" if context_dim is None else "fused",
            num_heads=num_heads,
            head_dim=head_dim,
            context_dim=context_dim,
            num_kv_heads=num_kv_heads,
            bias=False,
            context_bias=True,
            null_kv=True,
            qk_norm=qk_norm,
            linear=linear,
            causal=causal,
        )
        self.norm_out = nn.LayerNorm(width, bias=False)
        self.feed_forward = None
        if ff_mult:
            self.feed_forward = feed_forward(width, ff_mult, activation, inner_norm=ff_norm, dropout=dropout)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """tokens (b, n, width), context (b, l, context_dim) with its mask bool (b, l) -> (b, n, width)."""
        if self.norm_context is not None and context is not None:
            context = self.norm_context(context)
        attended = self.attention(self.norm(tokens), context, mask, bias=bias, rotary=rotary)
        tokens = tokens + self.norm_out(attended)
        return tokens if self.feed_forward is None else tokens + self.feed_forward(tokens)


def feed_forward(
    dim: int, multiplier: int, activation: Activation = "gelu", *, inner_norm: bool = True, dropout: float = 0.0
) -> nn.Sequential:
    """Norm, linear, activation, norm, linear, without biases: (..., dim) -> (..., dim)."""
    inner = multiplier * dim
    layers: list[nn.Module] = [nn.LayerNorm(dim, bias=False)]
    if activation == "gelu":
        layers += [nn.Linear(dim, inner, bias=False), nn.GELU()]
    else:
        layers += [nn.Linear(dim, 2 * inner, bias=False), Gated(activation)]
    if inner_norm:
        layers.append(nn.LayerNorm(inner, bias=False))
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(inner, dim, bias=False))
