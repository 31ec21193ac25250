"""Aspect-ratio buckets: the shapes that images of a store may have where they are not all square.

A store's smallest images have shapes with sides that are multiples of 8 and an area within 10 % of their square's;
those of larger images are the same shapes scaled, so that the images of one sample show the same part of the original.
The bucket of an image is a function of its width and height, which `samples` holds, and of the list: nothing else has
to be stored.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import gcd

import numpy as np

SIDE_MULTIPLE = 8
"""Sides of the smallest images are multiples of this, as UNets that halve an image three times need it."""
AREA_TOLERANCE = Fraction(1, 10)
DEFAULT_MAX_RATIO = 2.0
_LARGEST_BASE_PX = 1024

Shape = tuple[int, int]
"""Height and width in pixels."""


def bucket_shapes(size_px: int, max_ratio: float = DEFAULT_MAX_RATIO) -> tuple[Shape, ...]:
    """The shapes for a smallest size, from the tallest to the widest; the square is always one of them.

    Sides are multiples of a sixteenth of the square's side, of 8 pixels at least; for each side the other one is that
    whose area is nearest to the square's.

    Args:
        size_px: side of the square, in pixels.
        max_ratio: most that a longer side is of a shorter one, 1 or more.
    Raises:
        ValueError: `size_px` is no multiple of 8, or `max_ratio` is below 1.
    """
    if size_px < SIDE_MULTIPLE or size_px % SIDE_MULTIPLE:
        raise ValueError(f"buckets need a smallest size that is a multiple of {SIDE_MULTIPLE} (got {size_px})")
    if not max_ratio >= 1:
        raise ValueError(f"the largest ratio must be 1 or more (got {max_ratio})")
    step = max(SIDE_MULTIPLE, size_px // 16 // SIDE_MULTIPLE * SIDE_MULTIPLE)
    square, shapes = size_px**2, set()
    for side in range(step, int(size_px * (max_ratio + 1)) + 1, step):
        other = max(step, round_half_up(square, side * step) * step)
        is_near = abs(side * other - square) <= AREA_TOLERANCE * square
        if is_near and max(side, other) <= max_ratio * min(side, other):
            shapes |= {(side, other), (other, side)}
    shapes.add((size_px, size_px))
    return tuple(sorted(shapes, key=lambda shape: Fraction(shape[1], shape[0])))


def scaled(shapes: Sequence[Shape], smallest_px: int, size_px: int) -> tuple[Shape, ...]:
    """The shapes of larger images of the same samples.

    Raises:
        ValueError: a side is not a whole number of pixels.
    """
    factor = Fraction(size_px, smallest_px)
    for height, width in shapes:
        if (height * factor).denominator != 1 or (width * factor).denominator != 1:
            raise ValueError(
                f"images of {size_px} px cannot have the shapes of those of {smallest_px} px: {height} x {width} "
                f"times {factor} is no whole number of pixels; use {smallest_px * 2} or {smallest_px * 4}"
            )
    return tuple((int(height * factor), int(width * factor)) for height, width in shapes)


def ratios_of(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes in lowest terms: the same for all sizes of a store."""
    return tuple((height // gcd(height, width), width // gcd(height, width)) for height, width in shapes)


def shapes_difference(one: Sequence[Shape], other: Sequence[Shape]) -> str:
    """`images.FIELD: its value -> that of the other` of two different lists of shapes; none are squares.

    The settings are found from the lists: the size is the smallest whose list has these ratios.
    """
    found = [_settings_of(ratios_of(shapes)) for shapes in (one, other)]
    for field in ("aspect", "aspect_base_px", "max_aspect_ratio"):
        values = [settings.get(field) for settings in found]
        if values[0] != values[1] and None not in values:
            return f"images.{field}: {values[0]} -> {values[1]}"
    lists = (", ".join(f"{width}:{height}" for height, width in ratios_of(shapes)) for shapes in (one, other))
    return f"width:height of the buckets: {' -> '.join(lists)}"


def _settings_of(ratios: tuple[Shape, ...]) -> dict[str, object]:
    """The settings of `images` with which a store has buckets of these ratios, as far as they are known."""
    if not ratios:
        return {"aspect": "square"}
    widest = max(max(ratio) / min(ratio) for ratio in ratios)
    for size_px in range(SIDE_MULTIPLE, _LARGEST_BASE_PX + 1, SIDE_MULTIPLE):
        if ratios_of(bucket_shapes(size_px, widest * (1 + 1e-9))) == ratios:
            return {"aspect": "buckets", "aspect_base_px": size_px, "max_aspect_ratio": round(widest, 2)}
    return {"aspect": "buckets"}


def choose_buckets(widths: np.ndarray, heights: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """The bucket of each original: the shape that crops the smallest part of it; of two the first.

    Args:
        widths, heights: pixels of the originals after EXIF orientation; 0 where there is none (a sample whose content
            was erased), which has the bucket of a square.
        shapes: height and width of each bucket.
    Returns:
        int64, indices into `shapes`.
    """
    has_size = (widths > 0) & (heights > 0)
    ratios = np.where(has_size, widths, 1) / np.where(has_size, heights, 1)
    wanted = np.array([width / height for height, width in shapes])
    kept = np.minimum(ratios[:, None], wanted) / np.maximum(ratios[:, None], wanted)  # part of the area that is kept
    return kept.argmax(axis=1)


def choose_shape(width: int, height: int, shapes: Sequence[Shape]) -> Shape:
    """The shape of the bucket of one original; see `choose_buckets`."""
    return shapes[int(choose_buckets(np.array([width]), np.array([height]), shapes)[0])]


def crop_box(width: int, height: int, shape: Shape) -> tuple[int, int, int, int]:
    """The largest centred part of an original with the ratio of a shape: left, top, right, bottom in whole pixels.

    An odd margin is one pixel larger at the end, as it is for squares.
    """
    rows, columns = shape
    if width * rows >= height * columns:  # wider than the shape
        kept_width, kept_height = max(1, round_half_up(height * columns, rows)), height
    else:
        kept_width, kept_height = width, max(1, round_half_up(width * rows, columns))
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return left, top, left + kept_width, top + kept_height


def round_half_up(numerator: int, denominator: int) -> int:
    """The nearest whole number to a quotient of whole numbers."""
    return (2 * numerator + denominator) // (2 * denominator)
