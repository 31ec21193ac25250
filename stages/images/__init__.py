"""Images in memory: decode to sRGB, crop and resize."""

from stages.images.decode import Decoded, decode_rgb
from stages.images.files import MAX_PIXELS, read_image
from stages.images.rejection import ImageRejected, RejectReason
from stages.images.resample import Filter, center_square, pyramid, pyramid_of_shapes, resize_square

__all__ = [
    "MAX_PIXELS",
    "Decoded",
    "Filter",
    "ImageRejected",
    "RejectReason",
    "center_square",
    "decode_rgb",
    "pyramid",
    "pyramid_of_shapes",
    "read_image",
    "resize_square",
]
