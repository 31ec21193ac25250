"""Crop and antialiased resize: the result of Pillow's `Image.resize`, by the fastest path that gives it.

The uint8 path of `torch.nn.functional.interpolate` is several times faster than Pillow, but keeps its
weights in 16 bits. Where both sides shrink to half or less, none of 300 million bicubic values of noise, zone
plates, photo-like images and emoji was more than one level off Pillow's; of images made of pixel-fine
stripes or checks, up to one value in 200,000 was two levels off, and of 1,400 plots with fine lines six had one
to six such values of 12,288. Where one shrinks less, or grows, noise reaches two levels too, so Pillow
resizes these.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import numpy as np
from PIL import Image

from imagen_core.store.buckets import Shape, crop_box

Filter = Literal["bicubic", "lanczos", "box", "bilinear"]

_PILLOW_FILTERS: dict[Filter, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
}
_TORCH_FILTERS = ("bicubic", "bilinear")
_TORCH_MIN_SHRINK = 2  # input side / output side


def center_square(pixels: np.ndarray) -> np.ndarray:
    """View of the centre square of (height, width, 3) pixels; an odd margin is one larger at the end."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def pyramid(pixels: np.ndarray, sizes_px: Iterable[int], filter: Filter = "bicubic") -> dict[int, np.ndarray]:
    """Centre crop uint8 (height, width, 3) and resize it to every size, each straight from the full crop."""
    return pyramid_of_shapes(pixels, {size: (size, size) for size in sizes_px}, filter)


def pyramid_of_shapes(
    pixels: np.ndarray, shapes: Mapping[int, Shape], filter: Filter = "bicubic"
) -> dict[int, np.ndarray]:
    """Cut uint8 (height, width, 3) to the ratio of the shapes, and resize that to each, straight from the full crop.

    Args:
        shapes: height and width by size, all of one ratio, so that all images show the same part.
    """
    if not shapes:
        return {}
    height, width = pixels.shape[:2]
    left, top, right, bottom = crop_box(width, height, next(iter(shapes.values())))
    crop = np.require(pixels[top:bottom, left:right], requirements=["C", "W"])  # one copy here, none per size
    return {size: resize(crop, shape, filter) for size, shape in shapes.items()}


def resize_square(pixels: np.ndarray, size_px: int, filter: Filter = "bicubic") -> np.ndarray:
    """Resize uint8 (side, side, 3) to a new uint8 (size_px, size_px, 3); see `resize`."""
    if pixels.ndim == 3 and pixels.shape[0] != pixels.shape[1]:
        raise ValueError(f"pixels must be square, got {pixels.shape}; call center_square first")
    return resize(pixels, (size_px, size_px), filter)


def resize(pixels: np.ndarray, shape: Shape, filter: Filter = "bicubic") -> np.ndarray:
    """Resize uint8 (height, width, 3) to a new uint8 of the shape (height, width, 3), antialiased.

    torch uses as many threads as the process allows it; a worker sets that once for itself.
    """
    _check(pixels, shape, filter)
    found = pixels.shape[:2]
    if found == shape:
        return pixels.copy()
    shrinks = all(side >= _TORCH_MIN_SHRINK * wanted for side, wanted in zip(found, shape, strict=True))
    if filter in _TORCH_FILTERS and shrinks:
        return _resize_torch(pixels, shape, filter)
    return np.array(Image.fromarray(pixels).resize((shape[1], shape[0]), _PILLOW_FILTERS[filter]))


def _resize_torch(pixels: np.ndarray, shape: Shape, filter: Filter) -> np.ndarray:
    import torch
    from torch.nn.functional import interpolate

    source = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))  # (h, w, 3)
    batch = source[None].permute(0, 3, 1, 2)  # (1, 3, h, w), channels last in memory, and so is the result
    resized = interpolate(batch, size=shape, mode=filter, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def _check(pixels: np.ndarray, shape: Shape, filter: str) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels must be uint8 (height, width, 3), got {pixels.dtype} {pixels.shape}")
    if min(shape) < 1:
        raise ValueError(f"sides must be at least 1 pixel, got {min(shape)}")
    if filter not in _PILLOW_FILTERS:
        raise ValueError(f"filter must be one of {', '.join(get_args(Filter))}; got {filter!r}")
