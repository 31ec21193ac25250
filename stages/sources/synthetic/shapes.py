"""Antialiased plain shapes, and a fast PNG writer for images made of them."""

import math
import struct
import zlib

import numpy as np
from PIL import Image, ImageDraw


def _fan(num_points: int, *radii: float) -> list[tuple[float, float]]:
    """Points on circles around the centre of the unit box, clockwise from the top, radii in turn."""
    angles = (2 * math.pi * i / num_points for i in range(num_points))
    return [
        (0.5 + radii[i % len(radii)] * math.sin(a), 0.5 - radii[i % len(radii)] * math.cos(a))
        for i, a in enumerate(angles)
    ]


def _fit(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Stretch points so that they fill the unit box."""
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    return [((x - x0) / (x1 - x0), (y - y0) / (y1 - y0)) for x, y in points]


_A, _B = 0.33, 0.67  # the arms of the cross
_OUTLINES: dict[str, tuple[list[tuple[float, float]], ...]] = {
    "circle": (_fan(72, 0.5),),
    "square": ([(0, 0), (1, 0), (1, 1), (0, 1)],),
    "triangle": ([(0.5, 0), (1, 1), (0, 1)],),
    "star": (_fit(_fan(10, 0.5, 0.21)),),
    "cross": (
        [
            (_A, 0),
            (_B, 0),
            (_B, _A),
            (1, _A),
            (1, _B),
            (_B, _B),
            (_B, 1),
            (_A, 1),
            (_A, _B),
            (0, _B),
            (0, _A),
            (_A, _A),
        ],
    ),
    "ring": (_fan(72, 0.5), _fan(72, 0.27)),
}
"""Polygons in the unit box: the outer edge, and for the ring its hole."""

SHAPES: tuple[str, ...] = tuple(_OUTLINES)


def shape_mask(
    shape: str, center_x_px: float, center_y_px: float, extent_px: float, oversample: int = 4
) -> tuple[Image.Image, tuple[int, int]]:
    """Draw the antialiased coverage (mode "L", 0..255) of a shape that fills a square box.

    Returns:
        The mask, just large enough for the box, and the pixel (x, y) of its top left corner.
    """
    left, top = center_x_px - extent_px / 2, center_y_px - extent_px / 2
    corner = math.floor(left), math.floor(top)
    size = math.ceil(left + extent_px) - corner[0], math.ceil(top + extent_px) - corner[1]
    mask = Image.new("L", (size[0] * oversample, size[1] * oversample))
    draw = ImageDraw.Draw(mask)
    for fill, outline in zip((255, 0), _OUTLINES[shape], strict=False):
        # Pillow counts from pixel centres, hence the half.
        draw.polygon(
            [
                (
                    (left - corner[0] + x * extent_px) * oversample - 0.5,
                    (top - corner[1] + y * extent_px) * oversample - 0.5,
                )
                for x, y in outline
            ],
            fill=fill,
        )
    return mask.reduce(oversample), corner


def encode_png(image: Image.Image) -> bytes:
    """Write an RGB image as a PNG file without row filters.

    Flat images need no filters, and Pillow, which always tries them all, takes about twice as long.
    """
    pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row starts with its filter type, 0
    rows[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    data = zlib.compress(rows.tobytes(), level=1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
