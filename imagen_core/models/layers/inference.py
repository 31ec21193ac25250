"""Networks prepared for inference in float32 on a CPU: convolutions and linear layers with packed weights.

oneDNN computes them fastest from weights in an order of its own, with the channels of a pixel side by side; PyTorch
brings them into that order at every call. Wide 3x3 convolutions of many pixels are computed by `winograd`.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from imagen_core.models.layers.resblock import StandardizedConv2d
from imagen_core.models.layers.winograd import convolve, packed_kernel

_OPS = ("_convolution_pointwise", "_linear_pointwise", "_reorder_linear_weight")
_NONE: tuple[str, list[Any], str] = ("none", [], "")  # no activation after the layer
_WINOGRAD_CHANNELS, _WINOGRAD_TILES = 128, 96
"""Fewest channels, and tiles of 4 x 4 pixels in a batch, from which Winograd's convolution measures faster."""
_WINOGRAD_GROWTH = 4
"""How much larger its weights are."""


class _Room:
    """Bytes that may be spent on larger weights."""

    def __init__(self, num_bytes: int):
        self.left = num_bytes

    def take(self, num_bytes: int) -> bool:
        """Takes them if there are as many."""
        if num_bytes > self.left:
            return False
        self.left -= num_bytes
        return True


class _Packed(nn.Module):
    """A layer whose weight lies in oneDNN's order from its first call on, which says for which sizes.

    Attributes:
        weight: of the layer that it replaces, until then; no parameter.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight: Tensor = weight.detach()
        self.bias: Tensor | None = None if bias is None else bias.detach()
        self.is_packed = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Packed":
        moved = fn(torch.zeros(1))
        if moved.dtype != torch.float32 or moved.device.type != "cpu":
            raise RuntimeError(
                "a model that was prepared by optimize_for_cpu stays in float32 on the CPU (asked for "
                f"{moved.dtype} on {moved.device}); load it again"
            )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        raise RuntimeError("a model that was prepared by optimize_for_cpu cannot be saved; load it again")


class PackedConv2d(_Packed):
    """A convolution, without gradients."""

    def __init__(self, layer: nn.Conv2d, room: _Room):
        weight = layer.standardized() if isinstance(layer, StandardizedConv2d) else layer.weight
        super().__init__(weight, layer.bias)
        assert not isinstance(layer.padding, str)
        self.placed = (layer.padding, layer.stride, layer.dilation)
        plain_3x3 = layer.kernel_size == (3, 3) and self.placed == ((1, 1), (1, 1), (1, 1))
        self.may_use_winograd = plain_3x3 and min(layer.in_channels, layer.out_channels) >= _WINOGRAD_CHANNELS
        self.uses_winograd, self._room = False, room

    def forward(self, input: Tensor) -> Tensor:
        """float32 (b, in_channels, h, w) -> (b, out_channels, h', w'), channels-last."""
        if not self.is_packed:
            self._pack(input.shape)
        if self.uses_winograd:
            assert self.bias is not None
            return convolve(input, self.weight, self.bias)
        input = input.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(input, self.weight, self.bias, *self.placed, 1, *_NONE)

    def _pack(self, shape: torch.Size) -> None:
        tiles = shape[0] * -(-shape[2] // 4) * -(-shape[3] // 4)
        growth = (_WINOGRAD_GROWTH - 1) * self.weight.numel() * self.weight.element_size()
        if self.may_use_winograd and tiles >= _WINOGRAD_TILES and self._room.take(growth):
            self.weight, self.bias = packed_kernel(self.weight, self.bias)
            self.uses_winograd = True
        else:
            reorder = torch._C._nn.mkldnn_reorder_conv2d_weight  # pyright: ignore[reportAttributeAccessIssue]
            self.weight = reorder(self.weight.contiguous().to_mkldnn(), *self.placed, 1, tuple(shape))
        self.is_packed = True


class PackedLinear(_Packed):
    """A linear layer, without gradients."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.weight, layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        """float32 (..., in_features) -> (..., out_features)."""
        if not self.is_packed:
            rows = input.numel() // input.shape[-1]
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), rows)
            self.is_packed = True
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, *_NONE)


def optimize_for_cpu(model: nn.Module, *, winograd_bytes: int = 128 * 2**20) -> None:
    """Replaces layers of a model by ones that infer faster in float32 on a CPU; results agree to about 1e-5.

    The model then cannot be trained, moved, cast or saved, and sees no later change of a weight. Layers that are not
    on the CPU in float32, or compute something else with their weights (adapters), stay; without oneDNN all do.

    Args:
        winograd_bytes: memory for the larger weights of Winograd's convolution; 0 is without it.
    """
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in _OPS):
        return
    room = _Room(winograd_bytes)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in child.parameters()):
                continue
            if isinstance(child, nn.Conv2d) and type(child) in (nn.Conv2d, StandardizedConv2d) and _is_plain(child):
                setattr(module, name, PackedConv2d(child, room))
            elif type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _is_plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
