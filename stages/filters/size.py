"""Filters by the size of the image."""

from typing import Literal

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
