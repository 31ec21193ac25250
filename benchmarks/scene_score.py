"""Reads color, shape and place of the object in an image, to score images generated from a caption.

Every pixel is taken as a mix of the background and one color. That gives a soft mask, which is compared
with each shape painted at the same area and centroid. Antialiasing, blur and moderate noise do not matter
much, and the image may be as small as 16 x 16.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from stages.sources.synthetic.scenes import COLORS, POSITIONS, SIZES, Scene
from stages.sources.synthetic.shapes import SHAPES, shape_mask

_MIN_AREA = 0.01  # of the image; the smallest object covers about 0.03
_MIN_OVERLAP = 0.4  # least soft IoU of a mask that counts as a shape at all
_MIN_CONTRAST = 50  # least RGB distance from the background of a color that can be told apart from it
_BLURS_PX = (0.0, 0.6, 1.2)  # the image is compared with shapes this blurred
_SMALL_BELOW = (SIZES["small"][1] + SIZES["large"][0]) / 2
_NEAR_CENTRE = (POSITIONS["right"][0] - 0.5) / 2


@dataclass(frozen=True, slots=True)
class Reading:
    """What an image shows, in caption words."""

    color: str
    shape: str
    size: str
    position: str
    overlap: float
    """Soft IoU in [0, 1] of the object with the best shape."""


@dataclass(frozen=True, slots=True)
class Score:
    """Which parts of a single-object caption an image shows."""

    color_ok: bool
    shape_ok: bool
    position_ok: bool


def score_single(pixels: NDArray[np.uint8], scene: Scene) -> Score:
    """Score an image, uint8 (S, S, 3) RGB 0..255, against a scene with a single object.

    An image without an object has nothing right. Chance is 1/8 for color, 1/6 for shape and 1/5 for
    position.
    """
    if len(scene.objects) != 1:
        raise ValueError(f"score_single needs a scene with one object (got {len(scene.objects)})")
    reading = read_single(pixels)
    if reading is None:
        return Score(False, False, False)
    wanted = scene.objects[0]
    return Score(
        color_ok=reading.color == wanted.color,
        shape_ok=reading.shape == wanted.shape and reading.overlap >= _MIN_OVERLAP,
        position_ok=reading.position == wanted.position,
    )


def read_single(pixels: NDArray[np.uint8]) -> Reading | None:
    """Describe the one object of an image, uint8 (S, S, 3) RGB 0..255; None if it shows no object."""
    if pixels.ndim != 3 or pixels.shape[0] != pixels.shape[1] or pixels.shape[2] != 3:
        raise ValueError(f"pixels must have shape (S, S, 3) (got {pixels.shape})")
    color, mask = _separate(pixels.astype(np.float64))
    area = mask.sum()
    if area < _MIN_AREA * mask.size:
        return None
    side = len(mask)
    middles = np.arange(side) + 0.5
    centroid_x = float(mask.sum(axis=0) @ middles / area)
    centroid_y = float(mask.sum(axis=1) @ middles / area)

    best = (-1.0, "", 0.0, 0.0, 0.0)
    for shape in SHAPES:
        unit_area, unit_x, unit_y = _unit_moments(shape)
        extent = math.sqrt(area / unit_area)
        x, y = centroid_x - (unit_x - 0.5) * extent, centroid_y - (unit_y - 0.5) * extent
        sharp = _template(shape, x, y, extent, side)
        for blur_px in _BLURS_PX:
            template = _shares(sharp.filter(ImageFilter.GaussianBlur(blur_px)))
            overlap = float(np.minimum(mask, template).sum() / np.maximum(mask, template).sum())
            best = max(best, (overlap, shape, x / side, y / side, extent / side))
    overlap, shape, x, y, extent = best
    size = "small" if extent < _SMALL_BELOW else "large"
    return Reading(color, shape, size, _position(x, y), overlap)


def _separate(pixels: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
    """Find the color that, mixed with the background, explains the pixels best.

    Returns:
        The color and its share in every pixel: (S, S), 0 far from the object and
        about 0..1 near it (noise may reach -0.5 or 1.5).
    """
    width = max(1, len(pixels) // 32)
    frame = np.ones(pixels.shape[:2], bool)
    frame[width:-width, width:-width] = False
    background = np.median(pixels[frame], axis=0)
    offsets = pixels - background

    best = (math.inf, "", np.zeros(frame.shape))
    for name, rgb in COLORS.items():
        direction = np.array(rgb) - background
        if direction @ direction < _MIN_CONTRAST**2:
            continue
        share = offsets @ direction / (direction @ direction)
        residual = np.square(offsets - share.clip(0, 1)[..., None] * direction).sum()
        if residual < best[0]:
            best = (residual, name, share)
    _, name, share = best
    # Close to the object shares below 0 and above 1 stay, so that noise does not add to its area.
    near = _dilate(share > 0.5, max(2, len(share) // 16))
    return name, np.where(near, share.clip(-0.5, 1.5), 0.0)


def _dilate(mask: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    """Grow a mask by `steps` pixels in all eight directions."""
    for axis in (0, 1):
        for _ in range(steps):
            padded = np.pad(mask, [(1, 1) if a == axis else (0, 0) for a in (0, 1)])
            before, after = (padded.take(range(i, i + mask.shape[axis]), axis) for i in (0, 2))
            mask = mask | before | after
    return mask


@cache
def _unit_moments(shape: str) -> tuple[float, float, float]:
    """Area and centroid (x, y) of a shape that fills the unit box."""
    side = 256
    mask = _shares(_template(shape, side / 2, side / 2, side, side))
    area, middles = float(mask.sum()), (np.arange(side) + 0.5) / side
    return area / side**2, float(mask.sum(axis=0) @ middles) / area, float(mask.sum(axis=1) @ middles) / area


def _template(shape: str, x: float, y: float, extent: float, side: int) -> Image.Image:
    """Draw the coverage of a shape on a (side, side) canvas; lengths in pixels."""
    mask, corner = shape_mask(shape, x, y, extent, oversample=max(4, 256 // side))
    canvas = Image.new("L", (side, side))
    canvas.paste(mask, corner)
    return canvas


def _shares(coverage: Image.Image) -> NDArray[np.float64]:
    """Turn coverage, 0..255, into shares, 0..1."""
    return np.asarray(coverage) / 255.0


def _position(x: float, y: float) -> str:
    """Name the place of a centre given as fractions of the image."""
    dx, dy = x - 0.5, y - 0.5
    if max(abs(dx), abs(dy)) < _NEAR_CENTRE:
        return "centre"
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"
