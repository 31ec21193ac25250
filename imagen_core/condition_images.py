"""Further images that a network reads beside the noisy one, such as depth or edges, by name."""

from collections.abc import Mapping

import torch
from torch import Tensor

from imagen_core.diffusion.low_res import upsample
from imagen_core.images import in_range

UNNAMED = "images"
"""Name of the images of a model whose configuration does not name them."""


def channels_of(named: Mapping[str, int], condition_channels: int) -> dict[str, int]:
    """Channels by name in the order in which a network of so many channels in all reads them."""
    if named or not condition_channels:
        return dict(named)
    return {UNNAMED: condition_channels}


def joined_images(images: Mapping[str, Tensor], channels: Mapping[str, int], shape: tuple[int, int]) -> Tensor:
    """What a network reads: the images one after another, each stretched to `shape` (bicubic, antialiased).

    Args:
        images: (b, c, h, w) in [-1, 1], by name.
        channels: of each image that is read, at least one, in their order.
    Returns:
        (b, k, *shape), k the sum of the channels.
    Raises:
        ValueError: an image is missing, or has other channels.
    """
    for name, number in channels.items():
        found = None if name not in images else tuple(images[name].shape)
        if found is None or found[1] != number:
            raise ValueError(f"condition_images.{name}: the model reads (b, {number}, h, w) (got {found})")
    return torch.cat([upsample(images[name], shape) for name in channels], dim=1)


def stored_images(
    arrays: Tensor, sizes: Tensor | None, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Images of a batch of a store's loader, stretched to `shape`.

    Args:
        arrays: uint8 or bool (b, h, w) or (b, h, w, c), padded where shapes differ; 0 is -1, and 255 or true is 1.
        sizes: int64 (b, 2) or (b, 3), the shape of each; None where all are equal. An empty one becomes zeros.
    Returns:
        (b, c, *shape) in [-1, 1].
    """
    levels = arrays.to(torch.uint8) * (255 if arrays.dtype == torch.bool else 1)
    levels = levels[..., None] if levels.ndim == 3 else levels
    pixels = in_range(levels.to(device, non_blocking=True).permute(0, 3, 1, 2), dtype)
    if sizes is None and len(pixels):
        return upsample(pixels, shape)
    result = pixels.new_zeros(len(pixels), pixels.shape[1], *shape)
    for row, (height, width) in enumerate([] if sizes is None else sizes[:, :2].tolist()):
        if height and width:
            result[row : row + 1] = upsample(pixels[row : row + 1, :, :height, :width], shape)
    return result
