"""The one residual block of all UNets, its parts, and the layers that change resolution."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.attention import zero_
from imagen_core.models.inputs import Context

Resample = Literal["none", "down", "up"]


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the noise level scales and shifts the second norm (ADM: Dhariwal and
    Nichol 2021, arXiv 2105.05233, table 1 and section 3.1).

    The last convolution starts at zero, so a new block passes its skip branch through.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int,
        *,
        dropout: float = 0.0,
        num_groups: int = 32,
        always_project_skip: bool = False,
        skip_scale: float = 1.0,
        scale_shift: bool = True,
        resample: Resample = "none",
        norm: Literal["group", "rms"] = "group",
        zero_init: bool = True,
        text_attention: nn.Module | None = None,
        gate: nn.Module | None = None,
    ):
        """
        Args:
            always_project_skip: a 1x1 convolution on the skip branch even where the widths agree.
            skip_scale: factor on the skip branch; 1/sqrt(2) in Efficient UNets.
            scale_shift: False: the time vector is only added (DDPM, Ho et al. 2020).
            resample: average-pool or repeat both branches by 2 between the first norm and convolution.
            zero_init: the last convolution starts at zero.
            text_attention: (b, c, h, w) and a `Context` -> (b, c, h, w), between the two convolutions.
            gate: (b, c, h, w) -> (b, c, h, w), at the end of the branch.
        """
        super().__init__()
        self.resample: Resample = resample
        self.skip_scale, self.scale_shift = skip_scale, scale_shift
        self.norm1 = PixelRMSNorm(in_channels) if norm == "rms" else nn.GroupNorm(num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels if scale_shift else out_channels)
        self.text_attention = text_attention
        self.norm2 = PixelRMSNorm(out_channels) if norm == "rms" else nn.GroupNorm(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if zero_init:
            zero_(self.conv2)
        self.gate = gate
        projects = always_project_skip or in_channels != out_channels
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if projects else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (b, in_channels, h, w) -> (b, out_channels, h', w')."""
        h = F.silu(self.norm1(x))
        if self.resample != "none":
            h, x = resample(h, self.resample), resample(x, self.resample)
        h = self.conv1(h)
        if self.text_attention is not None:
            h = self.text_attention(h, context)
        shift = self.time(context.time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + shift)
        h = self.conv2(self.dropout(F.silu(h)))
        if self.gate is not None:
            h = self.gate(h)
        skip = self.skip(x)
        return torch.add(h, skip, alpha=self.skip_scale)


class PixelRMSNorm(nn.Module):
    """Root-mean-square norm over the channels of each pixel, with a gain (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> the same."""
        return F.normalize(x, dim=1) * (self.gain * self.gain.numel() ** 0.5)[:, None, None]


def resample(x: Tensor, how: Resample) -> Tensor:
    """Halves (mean of 2 x 2) or doubles (repeat) the sides of (b, c, h, w)."""
    return F.avg_pool2d(x, 2) if how == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


class RepeatConv(nn.Module):
    """Doubles the sides by repeating pixels, then a 3x3 convolution."""

    def __init__(self, dim: int, out_dim: int | None = None):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim or dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(resample(x, "up"))
