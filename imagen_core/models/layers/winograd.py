"""Winograd's convolution F(4x4, 3x3): a fourth of the multiplications (Lavin and Gray 2015, arXiv 1509.09308).

Tiles of 6 x 6 pixels give 4 x 4 pixels of the result. Each of the 36 numbers of a transformed tile has a matrix of its
own over the channels; together these are one 1x1 convolution in 36 groups, which oneDNN computes. The transforms are
sums, a few rows of tiles at a time, so that what is between them stays in the processor's cache.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_KERNEL = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6),
           (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))  # fmt: skip
_CONSTANT = 7
"""A bias added to this one of the 36 numbers is added to all pixels of the tile."""
_FEWEST, _MOST = 64, 256
"""Tiles at a time: oneDNN is slow with fewer, and what is between the transforms leaves the cache with more."""


def packed_kernel(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The matrices of a 3x3 convolution in oneDNN's order, and their bias (36 * out,).

    Args:
        weight: float32 (out, in, 3, 3).
        bias: (out,) or None.
    """
    width, channels = weight.shape[:2]
    kernel = torch.tensor(_KERNEL)
    matrices = torch.einsum("ia,ocab,jb->ijoc", kernel, weight, kernel).reshape(36 * width, channels, 1, 1)
    reorder = torch._C._nn.mkldnn_reorder_conv2d_weight  # pyright: ignore[reportAttributeAccessIssue]
    packed = reorder(matrices.to_mkldnn(), (0, 0), (1, 1), (1, 1), 36, (1, 36 * channels, 1, 2 * _FEWEST))
    biases = torch.zeros(36, width)
    if bias is not None:
        biases[_CONSTANT] = bias
    return packed, biases.flatten()


def convolve(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution of stride 1 with a margin of one pixel of zeros, about 1e-6 of the largest number apart.

    Args:
        x: float32 (b, c, h, w).
        kernel, bias: of `packed_kernel`.
    Returns:
        (b, out, h, w), channels-last.
    """
    batch, _, height, width = x.shape
    high, wide = -(-height // 4), -(-width // 4)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 4 * wide + 1 - width, 1, 4 * high + 1 - height))
    result = x.new_empty(batch, high, 4, wide, 4, bias.numel() // 36)
    images = max(1, _MOST // (high * wide))
    for image in range(0, batch, images):
        some, into = padded[image : image + images], result[image : image + images]
        parts = min(high, max(1, high * wide // _MOST))
        for part in range(parts):
            top, bottom = high * part // parts, high * (part + 1) // parts
            _rows(some[:, 4 * top : 4 * bottom + 2], kernel, bias, into[:, top:bottom])
    result = result.view(batch, 4 * high, 4 * wide, -1)
    return result[:, :height, :width].permute(0, 3, 1, 2)


def _rows(x: Tensor, kernel: Tensor, bias: Tensor, into: Tensor) -> None:
    """Pixels (b, 4 rows + 2, 4 wide + 2, c) -> `into` (b, rows, 4, wide, 4, out)."""
    batch, rows, _, wide, _, width = into.shape
    channels, tiles = x.shape[-1], batch * rows * wide
    down = x.new_empty(6, batch, rows, x.shape[2], channels)
    _to_tiles([x[:, i : i + 4 * rows - 3 : 4] for i in range(6)], down.unbind())
    space = x.new_empty(max(tiles, _FEWEST), 36 * channels)  # rows beyond the tiles are computed and not read
    turned = space[:tiles].view(batch, rows, wide, 6, 6, channels)
    columns = [down[:, :, :, j : j + 4 * wide - 3 : 4].permute(1, 2, 3, 0, 4) for j in range(6)]
    _to_tiles(columns, turned.unbind(4))
    many = torch.ops.mkldnn._convolution_pointwise(
        space[None, None].permute(0, 3, 1, 2), kernel, bias, (0, 0), (1, 1), (1, 1), 36, "none", [], ""
    )
    tiled = many.permute(0, 2, 3, 1)[0, 0, :tiles].view(batch, rows, wide, 6, 6, width)
    half = x.new_empty(4, batch, rows, wide, 6, width)
    _from_tiles(tiled.unbind(3), half.unbind())
    _from_tiles(half.unbind(4), [into[:, :, :, :, j].permute(2, 0, 1, 3, 4) for j in range(4)])


def _to_tiles(x: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Six numbers -> six, the paper's B^T x."""
    even, odd = torch.sub(x[4], x[2], alpha=4), torch.sub(x[3], x[1], alpha=4)
    torch.add(even, odd, out=into[1])
    torch.sub(even, odd, out=into[2])
    torch.sub(x[2], x[0], out=into[0])
    torch.sub(x[4], x[2], out=even)
    torch.sub(x[3], x[1], out=odd)
    torch.add(even, odd, alpha=2, out=into[3])
    torch.sub(even, odd, alpha=2, out=into[4])
    torch.sub(even, into[0], alpha=4, out=into[0])
    torch.sub(x[5], x[3], out=into[5])
    into[5].sub_(odd, alpha=4)


def _from_tiles(m: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Six numbers -> four, the paper's A^T m."""
    even, odd, even2, odd2 = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    torch.add(odd, odd2, alpha=2, out=into[1])
    torch.add(even, even2, alpha=4, out=into[2])
    torch.add(even.add_(even2), m[0], out=into[0])
    torch.add(odd.add_(odd2, alpha=8), m[5], out=into[3])
