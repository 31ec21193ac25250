"""Filters by the size of the image, and what part of some images passes them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from stages.filters.base import Filter, FilterRow, Rejection
from stages.images import MAX_PIXELS


class MaxPixels(Filter):
    """Drops images with too many pixels (`too_many_pixels`): a guard against decompression bombs.

    It is always active. The decoder applies it to the size in the file's header, before any pixel is decoded. Decoding
    takes at most 10 bytes per pixel of it, 1 GB by default: pixels of formats that take more count more than once.
    """

    kind: Literal["max_pixels"] = "max_pixels"
    max: int = Field(default=MAX_PIXELS, ge=1)
    """Largest width times height; a pixel of WebP counts as 2, of AVIF as 1.6, of progressive CMYK JPEG and of TIFF
    with 64 bits per pixel as 1.2."""

    def reject(self, row: FilterRow) -> Rejection | None:
        if row.width * row.height <= self.max:
            return None
        return Rejection("too_many_pixels", f"{row.width} x {row.height} is over {self.max} pixels")


class TooSmall(Filter):
    """Decides about images that would have to grow for the largest size of images.sizes_px (`too_small`): a side is
    less than that of the square, or of the shape of the image's bucket."""

    kind: Literal["too_small"] = "too_small"
    action: Literal["drop", "upscale"] = "drop"
    """upscale: they are stored, upsampled."""

    def reject(self, row: FilterRow) -> Rejection | None:
        size = max(row.sizes_px, default=0)
        height, width = row.shapes.get(size, (size, size))
        if self.action == "upscale" or (row.width >= width and row.height >= height):
            return None
        needed = f"{width}" if width == height else f"{width} x {height}"
        return Rejection("too_small", f"{row.width} x {row.height} px, {needed} needed")


class MaxSide(Filter):
    """Drops images with a longer side above a limit (`side_too_long`), by the size of the original."""

    kind: Literal["max_side"] = "max_side"
    max: int = Field(ge=1)
    """Most pixels of the longer side."""

    def reject(self, row: FilterRow) -> Rejection | None:
        if max(row.width, row.height) <= self.max:
            return None
        return Rejection("side_too_long", f"{row.width} x {row.height} px, at most {self.max} allowed")


class MinBytes(Filter):
    """Drops images whose file is small (`file_too_small`): placeholders, blank and heavily compressed images."""

    kind: Literal["min_bytes"] = "min_bytes"
    min: int = Field(ge=1)
    """Least bytes of the file as it was fetched."""

    def reject(self, row: FilterRow) -> Rejection | None:
        if not row.data or len(row.data) >= self.min:  # a source without images has no files
            return None
        return Rejection("file_too_small", f"{len(row.data)} bytes, {self.min} needed")


def size_rejections(filters: Sequence[Filter], rows: Iterable[FilterRow]) -> Counter[str]:
    """How many rows the filters by width and height reject, by reason; a row counts once."""
    by_size = [filter for filter in filters if isinstance(filter, MaxPixels | TooSmall | MaxSide)]
    found = (next((found.reason for filter in by_size if (found := filter.reject(row))), None) for row in rows)
    return Counter(reason for reason in found if reason is not None)


def blank_row(width: int, height: int, shapes: dict[int, tuple[int, int]]) -> FilterRow:
    """A row of which nothing is known but the size of its image; takes no memory for pixels."""
    pixels = np.broadcast_to(np.zeros(3, np.uint8), (height, width, 3))
    return FilterRow("", None, ("",), b"", tuple(shapes), pixels, {}, shapes)
