"""Images between disk, uint8 pixels and the [-1, 1] range of the models."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagen_core.files import write_durably


def to_pixels(images: Tensor) -> np.ndarray:
    """float (b, 3, h, w) in [-1, 1] (clipped) -> uint8 (b, h, w, 3), rounded to the nearest level."""
    levels = images.float().clamp(-1, 1).add(1).mul(127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def from_pixels(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 (b, h, w, 3) -> float32 (b, 3, h, w) in [-1, 1]."""
    return in_range(torch.as_tensor(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2))


def in_range(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 of any shape -> `dtype` in [-1, 1] of the same shape."""
    return pixels.to(dtype).div(127.5).sub(1)


def tile(pixels: Sequence[np.ndarray], columns: int, gap_px: int = 2) -> np.ndarray:
    """Images, uint8 (h, w, 3) each, in rows of `columns` on white, row by row: uint8 (H, W, 3).

    Each has the room of the largest height and width, and lies in the middle of it.
    """
    height, width = (max(image.shape[axis] for image in pixels) for axis in (0, 1))
    rows = -(-len(pixels) // columns)
    canvas = np.full((rows * (height + gap_px) - gap_px, columns * (width + gap_px) - gap_px, 3), 255, dtype=np.uint8)
    for index, image in enumerate(pixels):
        top = (index // columns) * (height + gap_px) + (height - image.shape[0]) // 2
        left = (index % columns) * (width + gap_px) + (width - image.shape[1]) // 2
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def write_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write uint8 (h, w, 3) as PNG, atomically and durably: the file appears complete or not at all."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    write_durably(Path(path), data.getvalue())
