"""What an image is recognised by: a digest of its pixels, perceptual hashes and a thumbnail."""

import hashlib

import numpy as np

from imagen_core.store import HashesGroup, ImageHashes
from imagen_core.store.buckets import crop_box
from stages.images import center_square, resize_square

METHOD = "ImageHash phash 8x8 of the centre square, plain and mirrored, of the whole and of five crops of 95 %; 1"
"""Part of the group's fingerprint: another text where other hashes are made."""
PLAIN = 0
"""The hash of the whole image; those of odd numbers are of mirrored images."""

_BASE_PX = 64
_HASHED_PX = 32
_HASH_BITS_PER_SIDE = 8
_THUMBNAIL_PX = 32
_BLUR_PX = 1.5  # so that an image that is shifted by half a pixel has the shifted thumbnail
_CROP = 0.05
_BOXES = (
    (0.0, 0.0, 1.0, 1.0),
    (_CROP / 2, _CROP / 2, 1 - _CROP / 2, 1 - _CROP / 2),
    *((left, top, left + 1 - _CROP, top + 1 - _CROP) for left in (0.0, _CROP) for top in (0.0, _CROP)),
)
"""Left, top, right and bottom, as parts of the side."""

HASHES = HashesGroup("hashes", num_perceptual=2 * len(_BOXES), thumbnail_px=_THUMBNAIL_PX)


def hash_image(pixels: np.ndarray) -> ImageHashes:
    """The hashes of a decoded image, uint8 (height, width, 3)."""
    return ImageHashes(pixels_digest(pixels), *_perceptual(pixels))


def hash_part(pixels: np.ndarray, width: int, height: int) -> ImageHashes:
    """The hashes of an image of a store, which has a part of its original: a square, or an aspect-ratio bucket.

    A bucket may lack an eighth of the original's shorter side, and so of its centre square, which is hashed. That is
    filled with the pixels at the edge: without, one in four images with the sizes of photographs is not recognised.

    Args:
        pixels: uint8 (h, w, 3).
        width, height: of the original.
    """
    rows, columns = pixels.shape[:2]
    left, top, right, bottom = crop_box(width, height, (rows, columns))
    before, behind = (top, left), (height - bottom, width - right)
    scales = rows / (bottom - top), columns / (right - left)
    short = int(width < height)
    margins = [(0, 0), (0, 0), (0, 0)]
    margins[short] = (round(before[short] * scales[short]), round(behind[short] * scales[short]))
    return ImageHashes(pixels_digest(pixels), *_perceptual(np.pad(pixels, margins, mode="edge")))


def pixels_digest(pixels: np.ndarray) -> bytes:
    """SHA-256 of height, width and pixels, 32 bytes: the same for files that decode to the same image."""
    digest = hashlib.sha256(np.array(pixels.shape[:2], "<u4").tobytes())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def _perceptual(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The perceptual hashes of the centre square, uint64 (12,), and its thumbnail, uint8 (32, 32, 3)."""
    from PIL import Image, ImageFilter

    square = np.require(center_square(pixels), requirements=["C", "W"])
    image = Image.fromarray(resize_square(square, _BASE_PX))
    gray, parts = image.convert("L"), []
    for box in _BOXES:
        scaled = (box[0] * _BASE_PX, box[1] * _BASE_PX, box[2] * _BASE_PX, box[3] * _BASE_PX)
        parts.append(np.asarray(gray.resize((_HASHED_PX, _HASHED_PX), Image.Resampling.LANCZOS, box=scaled)))
    small = image.filter(ImageFilter.GaussianBlur(_BLUR_PX))
    thumbnail = small.resize((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.BOX)
    return _phash(np.stack([view for part in parts for view in (part, part[:, ::-1])])), np.array(thumbnail)


def _phash(views: np.ndarray) -> np.ndarray:
    """The DCT hashes of gray views, uint8 (n, 32, 32) -> uint64 (n,): bit for bit those of ImageHash's `phash`, which
    takes one view at a time and twice as long for all."""
    from scipy.fft import dct

    low = np.asarray(dct(dct(views, axis=1), axis=2))[:, :_HASH_BITS_PER_SIDE, :_HASH_BITS_PER_SIDE].reshape(
        len(views), -1
    )
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view("<u8").ravel()
