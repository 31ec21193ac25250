"""What a CPU computes faster in other steps than PyTorch's own; the numbers are the same up to rounding."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_EPS = 1e-12
"""Shortest length that a vector is divided by, as in `F.normalize`."""
_MIN_ROWS = 64
"""Below it a product takes less time than the call of an autograd function."""


def scaled_unit(x: Tensor, gain: Tensor) -> Tensor:
    """Vectors of unit length, each component times its gain.

    In training in float32 on a CPU the backward pass has 5 passes over the vectors, where autograd's of the two steps
    has 13.

    Args:
        x: (..., c).
        gain: (c,).
    Returns:
        (..., c).
    """
    if torch.is_grad_enabled() and _is_plain(x):
        return _ScaledUnit.apply(x, gain)  # pyright: ignore[reportReturnType]
    return F.normalize(x, dim=-1) * gain


class _ScaledUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(_EPS).reciprocal_()
        ctx.save_for_backward(x, gain, inverse)
        return (x * inverse).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gain, inverse = ctx.saved_tensors
        unit = x * inverse
        along = grad * unit
        grad_gain = along.sum(dim=tuple(range(x.ndim - 1)))
        projected = (along @ gain)[..., None] if along.is_contiguous() else (along * gain).sum(dim=-1, keepdim=True)
        return (grad * gain).addcmul_(unit, projected, value=-1).mul_(inverse), grad_gain


def use_onednn(model: nn.Module) -> None:
    """Lets linear layers and 1x1 convolutions compute with oneDNN, in float32 without autocast.

    PyTorch's matrix products are MKL's, which has no AVX-512 kernels for processors of other makers than Intel: there
    oneDNN takes half the time. Where MKL is as fast nothing changes. Parameters and their names stay as they are.
    """
    if not _mkl_lacks_avx512():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_linear, module)  # pyright: ignore[reportAttributeAccessIssue]
        elif type(module) is nn.Conv2d and _is_pointwise(module):
            module.forward = partial(_pointwise, module)  # pyright: ignore[reportAttributeAccessIssue]


def _mkl_lacks_avx512() -> bool:
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available()):
        return False
    processors = Path("/proc/cpuinfo")
    intel = not processors.exists() or "GenuineIntel" in processors.read_text(errors="replace")
    return not intel and "AVX512" in backends.cpu.get_cpu_capability()


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _is_plain(x: Tensor) -> bool:
    """Whether x is computed with as it is: float32 of a CPU, by no compiled code."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    return plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    if not _is_plain(x) or x.numel() < _MIN_ROWS * layer.in_features:
        return F.linear(x, layer.weight, layer.bias)
    product = _Product.apply(x.reshape(-1, layer.in_features), layer.weight, layer.bias)
    return product.view(*x.shape[:-1], layer.out_features)  # pyright: ignore[reportAttributeAccessIssue]


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """(b, in_channels, h, w) -> (b, out_channels, h, w), channels-last."""
    if not _is_plain(x) or x.numel() < _MIN_ROWS * conv.in_channels:
        return F.conv2d(x, conv.weight, conv.bias)
    pixels = x.permute(0, 2, 3, 1)
    product = _Product.apply(pixels.reshape(-1, conv.in_channels), conv.weight.flatten(1), conv.bias)
    return product.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)  # pyright: ignore[reportAttributeAccessIssue]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, c), (d, c) -> (n, d)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """A linear layer of (n, c), by oneDNN in all three products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _onednn(grad, weight.t()) if of_x else None,
            _onednn(grad.t(), x.t()) if of_weight else None,
            grad.sum(dim=0) if of_bias else None,
        )
