"""A caption as one vector by multi-head attention, as in DeepFloyd IF."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadPooling(nn.Module):
    """Norm; the mean of the tokens plus a learned vector attends to itself and to the tokens; linear; norm.

    DeepFloyd IF's `encoder_pooling`, diffusers' `TextTimeEmbedding`. There is no linear layer behind the heads.
    """

    def __init__(self, text_dim: int, out_dim: int, num_heads: int):
        """`num_heads` divides text_dim."""
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(text_dim)
        self.query = nn.Parameter(torch.randn(text_dim) / text_dim**0.5)
        self.to_q = nn.Linear(text_dim, text_dim)
        self.to_kv = nn.Linear(text_dim, 2 * text_dim)
        self.proj = nn.Linear(text_dim, out_dim)
        self.norm_out = nn.LayerNorm(out_dim)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """(b, l, text_dim), bool (b, l) -> (b, out_dim); tokens that are not real are neither averaged nor seen."""
        text = self.norm(text)
        counts = mask.sum(dim=1, keepdim=True).clamp(min=1)
        mean = (text * mask[..., None]).sum(dim=1) / counts
        query = (mean + self.query)[:, None]
        tokens = torch.cat([query, text], dim=1)
        q = self.to_q(query).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (b, heads, 1, d)
        k, v = self.to_kv(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.pad(mask, (1, 0), value=True)[:, None, None]
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.norm_out(self.proj(pooled.transpose(1, 2).flatten(1)))
