"""The parts of a Hybrid UNet, except its ResBlocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.hybrid.config import HybridUNetSettings
from imagen_core.models.layers.attention import Attention, flatten_pixels, unflatten_pixels
from imagen_core.models.layers.context import Context
from imagen_core.models.layers.resblock import PixelRMSNorm
from imagen_core.models.layers.transformer import TransformerLayer
from imagen_core.models.unet.block import Block


class HybridLevel(nn.Module):
    """One resolution, on the way down or up: its blocks, and the layers that change the resolution before or after."""

    def __init__(
        self,
        *,
        before: nn.Module | None,
        first: nn.Module,
        blocks: list[Block],
        transformer: nn.Module | None,
        after: nn.Module | None,
    ):
        super().__init__()
        self.before, self.first, self.blocks = before, first, nn.ModuleList(blocks)
        self.transformer, self.after = transformer, after


class CrossEmbed(nn.Module):
    """Convolutions of several kernel sizes in parallel: the first makes half of the channels, the next a quarter."""

    def __init__(self, in_channels: int, out_channels: int, kernels: tuple[int, ...] = (3, 7, 15), stride: int = 1):
        super().__init__()
        parts = [out_channels // 2**index for index in range(1, len(kernels))]
        parts.append(out_channels - sum(parts))
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(in_channels, part, kernel, stride=stride, padding=(kernel - stride) // 2)
                for part, kernel in zip(parts, kernels, strict=True)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, out_channels, h / stride, w / stride)."""
        return torch.cat([conv(x) for conv in self.convs], dim=1)


class TwoConvs(nn.Module):
    """A 3x3 and a 1x1 convolution, summed: how the deepest level widens without downsampling."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.wide = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.narrow = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, out_channels, h, w)."""
        return self.wide(x) + self.narrow(x)


class TextAttention(nn.Module):
    """Pixels attend to the condition tokens; with a norm before and after, and a residual."""

    def __init__(
        self, width: int, config: HybridUNetSettings, *, level: int, linear: bool = False, middle: bool = False
    ):
        super().__init__()
        num_heads, head_dim = config.heads(level)
        num_heads, head_dim = config.cross_num_heads or num_heads, config.cross_head_dim or head_dim
        if middle:
            num_heads = config.middle_cross_num_heads or num_heads
            head_dim = config.middle_cross_head_dim or head_dim
        self.norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(
            width,
            kind="cross",
            linear=linear,
            num_heads=num_heads,
            head_dim=head_dim,
            context_dim=config.context_dim,
            bias=False,
            null_kv=True,
            qk_norm=config.qk_norm,
        )
        self.norm_out = nn.LayerNorm(width, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(b, c, h, w) -> the same shape."""
        attended = self.attention(self.norm(flatten_pixels(x)), context.tokens, context.mask)
        return x + unflatten_pixels(self.norm_out(attended), x)


class TransformerBlock(nn.Module):
    """Layers of multi-query attention over pixels and, optionally, condition tokens, with or without feed-forward."""

    def __init__(
        self,
        width: int,
        config: HybridUNetSettings,
        *,
        level: int,
        attend_to_conditions: bool,
        feed_forward: bool = True,
        depth: int = 1,
        linear: bool = False,
    ):
        super().__init__()
        num_heads, head_dim = config.heads(level)
        self.layers = nn.ModuleList(
            [
                TransformerLayer(
                    width,
                    num_heads=num_heads,
                    head_dim=head_dim,
                    ff_mult=config.ff_mult if feed_forward else 0,
                    context_dim=config.context_dim if attend_to_conditions else None,
                    qk_norm=config.qk_norm,
                    linear=linear,
                )
                for _ in range(depth)
            ]
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(b, c, h, w) -> the same shape."""
        tokens = flatten_pixels(x)
        for layer in self.layers:
            tokens = layer(tokens, context.tokens, context.mask)
        return unflatten_pixels(tokens, x)


class FeatureCombiner(nn.Module):
    """The outputs of all levels on the way up, each narrowed by a convolution and upsampled to one size."""

    def __init__(self, widths: list[int], config: HybridUNetSettings):
        super().__init__()
        self.upsample_first = config.combine_at == "full"
        rms = self.upsample_first and config.norm == "rms"

        def narrow(width: int) -> nn.Sequential:
            norm = PixelRMSNorm(width) if rms else nn.GroupNorm(8, width)
            return nn.Sequential(norm, nn.SiLU(), nn.Conv2d(width, config.dim, 3, padding=1))

        self.narrow = nn.ModuleList([narrow(width) for width in widths])

    def forward(self, features: list[Tensor], size: torch.Size) -> list[Tensor]:
        """(b, c, h, w) each -> (b, dim, *size) each."""
        pairs = zip(self.narrow, features, strict=True)
        if self.upsample_first:
            return [narrow(F.interpolate(feature, size=size, mode="nearest")) for narrow, feature in pairs]
        return [F.interpolate(narrow(feature), size=size, mode="nearest") for narrow, feature in pairs]


class GlobalContext(nn.Module):
    """Scales channels by a gate that is computed from attention-pooled pixels (Cao et al. 2019, arXiv 1904.11492)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = max(3, width // 2)
        self.score = nn.Conv2d(width, 1, 1)
        self.gate = nn.Sequential(nn.Conv2d(width, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> the same shape."""
        weights = self.score(x).flatten(2).softmax(dim=-1)  # (b, 1, h * w)
        pooled = torch.einsum("bcn,bn->bc", x.flatten(2), weights[:, 0])
        return x * self.gate(pooled[:, :, None, None])
