"""The residual block of all UNets, its parts, and the layers that change resolution."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.layers.activation import Activation, activate
from imagen_core.models.layers.attention import zero_
from imagen_core.models.layers.context import Context
from imagen_core.models.layers.cpu import scaled_unit

Resample = Literal["none", "down", "up", "up_learned"]


class ResBlock(nn.Module):
    """Norm, activation, convolution, twice; the noise level scales and shifts the second norm (ADM: Dhariwal and
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
        divisor: float = 1.0,
        scale_shift: bool = True,
        resample: Resample = "none",
        norm: Literal["group", "rms"] = "group",
        activation: Activation = "silu",
        zero_init: bool = True,
        conv_first: bool = False,
        weight_standardization: bool = False,
        text_attention: nn.Module | None = None,
        gate: nn.Module | None = None,
    ):
        """
        Args:
            always_project_skip: a 1x1 convolution on the skip branch even where the widths agree.
            skip_scale: factor on the skip branch; 1/sqrt(2) in Efficient UNets.
            divisor: the sum of both branches is divided by it; sqrt(2) in DeepFloyd IF's super-resolution.
            scale_shift: False adds the time vector before the second norm (DDPM, Ho et al. 2020).
            resample: average-pool or repeat both branches by 2 between the first norm and convolution; up_learned: a
                transposed convolution for each branch.
            zero_init: the last convolution starts at zero.
            conv_first: convolution, norm, activation, twice, the first norm scaled and shifted (DALLE2-pytorch); else
                norm, activation, convolution, twice, the second norm scaled and shifted.
            weight_standardization: the kernels of each output channel have mean 0 and variance 1.
            text_attention: (b, c, h, w) and a `Context` -> (b, c, h, w), between the two convolutions.
            gate: (b, c, h, w) -> (b, c, h, w), at the end of the branch.
        """
        super().__init__()
        self.resample: Resample = resample
        self.doubling = None
        if resample == "up_learned":
            layers = [nn.ConvTranspose2d(in_channels, in_channels, 4, stride=2, padding=1) for _ in range(2)]
            self.doubling = nn.ModuleList(layers)
        self.skip_scale, self.divisor, self.scale_shift = skip_scale, divisor, scale_shift
        self.activation: Activation = activation
        self.conv_first = conv_first
        conv = StandardizedConv2d if weight_standardization else nn.Conv2d
        self.norm1 = _norm(norm, out_channels if conv_first else in_channels, num_groups)
        self.conv1 = conv(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels if scale_shift else out_channels)
        self.text_attention = text_attention
        self.norm2 = _norm(norm, out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        if zero_init:
            zero_(self.conv2)
        self.gate = gate
        projects = always_project_skip or in_channels != out_channels
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if projects else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (b, in_channels, h, w) -> (b, out_channels, h', w')."""
        if self.conv_first:
            h = activate(self._shifted(self.norm1, self.conv1(x), context), self.activation)
            h = h if self.text_attention is None else self.text_attention(h, context)
            h = activate(self.norm2(self.conv2(self.dropout(h))), self.activation)
        else:
            h = activate(self.norm1(x), self.activation)
            if self.doubling is not None:
                h, x = self.doubling[0](h), self.doubling[1](x)
            elif self.resample != "none":
                h, x = resample(h, self.resample), resample(x, self.resample)
            h = self.conv1(h)
            h = h if self.text_attention is None else self.text_attention(h, context)
            h = self._shifted(self.norm2, h, context)
            h = self.conv2(self.dropout(activate(h, self.activation)))
        if self.gate is not None:
            h = self.gate(h)
        skip = self.skip(x)
        total = torch.add(h, skip, alpha=self.skip_scale)
        return total if self.divisor == 1 else total / self.divisor

    def _shifted(self, norm: nn.Module, h: Tensor, context: Context) -> Tensor:
        """A norm with the time vector's scale and shift, or after adding the time vector."""
        shift = self.time(context.time)[:, :, None, None]
        if not self.scale_shift:
            return norm(h + shift)
        scale, shift = shift.chunk(2, dim=1)
        return torch.addcmul(shift, norm(h), 1 + scale)


def _norm(kind: Literal["group", "rms"], channels: int, num_groups: int) -> nn.Module:
    return PixelRMSNorm(channels) if kind == "rms" else nn.GroupNorm(num_groups, channels)


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose kernel for each output channel has mean 0 and variance 1 (Qiao et al. 2019)."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, out_channels, h', w')."""
        return F.conv2d(input, self.standardized(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def standardized(self) -> Tensor:
        """The kernels that it convolves with, (out_channels, in_channels, kh, kw)."""
        flat = self.weight.flatten(1)
        variance, mean = torch.var_mean(flat, dim=1, correction=0, keepdim=True)
        return ((flat - mean) * (variance + 1e-5).rsqrt()).view_as(self.weight)


class PixelRMSNorm(nn.Module):
    """Root-mean-square norm over the channels of each pixel, with a learned gain (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> the same shape."""
        return scaled_unit(x.permute(0, 2, 3, 1), self.gain * self.gain.numel() ** 0.5).permute(0, 3, 1, 2)


def resample(x: Tensor, how: Resample) -> Tensor:
    """(b, c, h, w) -> half the sides by averaging 2 x 2 pixels, or twice the sides by repeating pixels."""
    return F.avg_pool2d(x, 2) if how == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


class RepeatConv(nn.Module):
    """Upsampling by repeating pixels, then a 3x3 convolution."""

    def __init__(self, dim: int, out_dim: int | None = None):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim or dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, h, w) -> (b, out_dim, 2 h, 2 w)."""
        return self.conv(resample(x, "up"))
