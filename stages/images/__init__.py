"""Images in memory: decode to sRGB, crop and resize."""

from stages.images.decode import Decoded, decode_rgb
from stages.images.files import MAX_PIXELS, read_image
from stages.images.rejection import ImageRejected, RejectReason
from stages.images.resample import Filter, center_square, pyramid, resize_square

__all__ = [
    "MAX_PIXELS",
    "Decoded",
    "Filter",
    "ImageRejected",
    "RejectReason",
    "center_square",
    "decode_rgb",
    "pyramid",
    "read_image",
    "resize_square",
]
