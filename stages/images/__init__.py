"""Images in memory: decode to sRGB, crop and resize."""

from stages.images.decode import Decoded, ImageRejected, RejectReason, decode_rgb
from stages.images.resample import Filter, center_square, pyramid, resize_square

__all__ = [
    "Decoded",
    "Filter",
    "ImageRejected",
    "RejectReason",
    "center_square",
    "decode_rgb",
    "pyramid",
    "resize_square",
]
