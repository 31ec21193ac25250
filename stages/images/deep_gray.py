"""Grayscale of more than 8 bits, and signed or float grayscale: which values are black and white.

Only what a file states counts, so that nothing is made black or white by a guess:

| file | black to white |
|---|---|
| PNG of 16 bits, PGM of any maximum | as the format says |
| TIFF with the tags SMinSampleValue and SMaxSampleValue | these |
| TIFF of 9 to 32 unsigned bits | 0 to 2**bits - 1 |
| TIFF of floats that all lie in 0..1 | 0 to 1 |

Other floats and signed integers, and images that would be black altogether though their values are not 0, are
rejected.
"""

import io
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

from stages.images.rejection import ImageRejected, RejectReason
from stages.images.tiles import Tile, box, tiles

_WIDTH, _BITS, _PHOTOMETRIC, _SAMPLES, _SAMPLE_FORMAT, _MIN, _MAX = 256, 258, 262, 277, 339, 340, 341
_PREDICTOR, _TILE_WIDTH = 317, 322
_WHITE_IS_ZERO = 0
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3  # values of SampleFormat
_FLOAT_TOLERANCE = 0.5 / 255  # half a level


def is_deep(image: Image.Image) -> bool:
    """Whether the values are not plain unsigned 8-bit ones."""
    return image.mode == "F" or image.mode.startswith("I") or (image.mode == "L" and _sample_format(image) == _SIGNED)


def to_gray(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """8-bit grayscale (mode L), and 8-bit alpha where one value is declared transparent.

    Raises:
        ImageRejected: the file does not say which values are black and white.
    """
    found = [_extrema(values) for _, values in _tiles(image)]
    extrema = _Extrema(min(e.low for e in found), max(e.high for e in found), all(e.is_finite for e in found))
    low, high = _range(image, extrema)
    transparent = image.info.get("transparency")  # PNG may declare one gray value transparent
    gray = np.empty((image.height, image.width), np.uint8)
    alpha = None if transparent is None else np.empty_like(gray)
    for tile, values in _tiles(image):
        gray[tile] = _levels(values, low, high)
        if alpha is not None:
            alpha[tile] = np.where(values == transparent, 0, 255)
    if gray.max() == 0 and extrema.high > max(low, 0):
        raise _unknown(f"values up to {extrema.high:g} of {high:g} would all be black")
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode != "L":
        gray = 255 - gray if image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else gray
    return Image.fromarray(gray), None if alpha is None else Image.fromarray(alpha)


class _Extrema(NamedTuple):
    low: float
    high: float
    is_finite: bool


def _extrema(values: np.ndarray) -> _Extrema:
    return _Extrema(float(values.min()), float(values.max()), bool(np.isfinite(values).all()))


def _tiles(image: Image.Image) -> Iterator[tuple[Tile, np.ndarray]]:
    """The values of each tile as the file means them; Pillow reads all integers of 32 bits as signed and all of 8 as
    unsigned."""
    is_unsigned_32 = image.mode == "I" and _sample_format(image) == _UNSIGNED
    kind = np.int8 if image.mode == "L" else np.uint32 if is_unsigned_32 else None
    for tile in tiles(image.height, image.width):
        values = np.asarray(image.crop(box(tile)))
        yield tile, values if kind is None else values.view(kind)


def _sample_format(image: Image.Image) -> int | None:
    """TIFF's SampleFormat; None for another format."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    return _first(image.tag_v2.get(_SAMPLE_FORMAT, _UNSIGNED))


def _first(value: object) -> int:
    return value[0] if isinstance(value, tuple) else value  # pyright: ignore[reportReturnType]


def _range(image: Image.Image, found: _Extrema) -> tuple[float, float]:
    """The values of black and white."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0, 65535  # PNG; Pillow scales PGM to it
    tags = image.tag_v2
    if _MIN in tags and _MAX in tags:
        low, high = float(_first(tags[_MIN])), float(_first(tags[_MAX]))
        if low < high:
            return low, high
        raise _unknown(f"SMinSampleValue {low:g} is not below SMaxSampleValue {high:g}")
    kind = _sample_format(image)
    if kind == _UNSIGNED:
        return 0, 2 ** _first(tags.get(_BITS, 1)) - 1
    if kind == _FLOAT:
        if not found.is_finite or (found.low >= -_FLOAT_TOLERANCE and found.high <= 1 + _FLOAT_TOLERANCE):
            return 0, 1  # what is not finite is rejected below
        raise _unknown(f"floats from {found.low:g} to {found.high:g}, which is not 0 to 1")
    raise _unknown("signed integers without SMinSampleValue and SMaxSampleValue")


def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 levels: whole bit depths keep their high byte, other ranges are rounded."""
    shift = int(high).bit_length() - 8
    if values.dtype.kind != "f" and low == 0 and high == 2 ** (shift + 8) - 1 and shift >= 0:
        return (np.clip(values, 0, int(high)) >> shift).astype(np.uint8)
    if np.isfinite(values).all():
        scaled = (np.clip(values, low, high) - low) / (high - low)
        return np.rint(scaled * 255).astype(np.uint8)
    raise _unknown("floats that are not finite")


def _unknown(detail: str) -> ImageRejected:
    return ImageRejected(RejectReason.UNSUPPORTED_RANGE, detail)


# ---- packed bits ----


def read_packed(data: bytes, max_pixels: int) -> Image.Image | None:
    """Grayscale TIFF of 9 to 15 packed bits per sample, which Pillow does not read, as mode L; None for another file.

    Pillow reads the same file as one of 8 bits with wider rows, which undoes any lossless compression; the bits are
    put together here.

    Raises:
        ImageRejected: it has more than `max_pixels` pixels.
    """
    order = "<" if data[:2] == b"II" else ">"
    if struct.unpack_from(order + "H", data, 2)[0] != 42:
        return None  # BigTIFF
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    entries = {}
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from(order + "HHI", data, place)
        entries[tag] = (place + 8, "H" if kind == 3 else "I", length)

    def value(tag: int, default: int) -> int:
        place, letter, length = entries.get(tag, (0, "", 0))
        return struct.unpack_from(order + letter, data, place)[0] if length == 1 else default

    width, height, bits = value(_WIDTH, 0), value(_WIDTH + 1, 0), value(_BITS, 1)
    if not 9 <= bits <= 15 or value(_SAMPLES, 1) != 1 or value(_SAMPLE_FORMAT, 1) != 1 or value(_PREDICTOR, 1) != 1:
        return None
    if _TILE_WIDTH in entries or width == 0:
        return None
    if width * height > max_pixels:
        raise ImageRejected(RejectReason.TOO_MANY_PIXELS, f"{width} x {height} is over {max_pixels} pixels")
    as_bytes, row_bytes = bytearray(data), -(-width * bits // 8)
    for tag, new in ((_WIDTH, row_bytes), (_BITS, 8)):
        place, letter, _ = entries[tag]
        struct.pack_into(order + letter, as_bytes, place, new)
    image = TiffImagePlugin.TiffImageFile(io.BytesIO(as_bytes))
    image.load()
    gray, stored = np.empty((height, width), np.uint8), np.asarray(image)
    for row, line in zip(gray, stored, strict=True):
        packed = np.unpackbits(line)[: width * bits].reshape(width, bits)
        row[:] = packed[:, :8] @ (1 << np.arange(7, -1, -1))  # its high byte
    return Image.fromarray(gray)
