"""Images in single files, read by the rules by which precompute reads them."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import ConfigError
from stages.images.decode import decode_rgb
from stages.images.rejection import ImageRejected, RejectReason
from stages.images.resample import center_square, resize_square
from stages.places import read_place

MAX_PIXELS = 100_000_000
"""Largest width times height, unless a configuration says otherwise."""


def read_image(path: str | Path, size_px: int | None = None, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image as `decode_rgb` decodes it: uint8 (h, w, 3), upright sRGB on white.

    Args:
        path: a path or a URL.
        size_px: crop the centre square and resize it (bicubic, antialiased) to this side; None keeps the image.
    Raises:
        ConfigError: the file is missing, no usable image, or has more than `max_pixels` pixels.
    """
    try:
        pixels = decode_rgb(read_place(path), max_pixels=max_pixels).pixels
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as an image ({error.strerror or error}); check the path") from error
    except ImageRejected as error:
        remedy = "give a PNG, JPEG or WebP file"
        if error.reason == RejectReason.TOO_MANY_PIXELS:
            remedy = "give a smaller image"
        raise ConfigError(f"{path}: cannot be read as an image ({error}); {remedy}") from error
    return np.array(pixels, order="C") if size_px is None else resize_square(center_square(pixels), size_px)


def square_side(path: str | Path) -> int | None:
    """Side of the centre square in pixels, from the header of a file; None if it does not tell, or is missing."""
    try:
        with Image.open(io.BytesIO(read_place(path)) if "://" in str(path) else path) as image:
            return min(image.size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def check_images(paths: Iterable[str | Path]) -> None:
    """Checks by their headers that files are images.

    Raises:
        ConfigError: names the first one that is not.
    """
    for path in paths:
        if square_side(path) is None:
            read_image(path)  # says why
