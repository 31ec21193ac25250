"""How one image is stored: as raw pixels, or as the bytes of a PNG, WebP or JPEG file."""

import io
from typing import Any, Literal, get_args

import numpy as np

from imagen_core.store.buckets import Shape

Codec = Literal["raw", "png", "webp", "jpeg"]

# Arguments of Pillow's save(). The same pixels give the same bytes with the same Pillow.
_SETTINGS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 6},
    "webp": {"lossless": True, "quality": 20, "method": 0},  # quality is effort here, pixels stay the same
    "jpeg": {"quality": 95, "subsampling": "4:4:4", "optimize": True},
}


def check_codec(codec: object) -> Codec:
    """Returns the codec; raises ValueError with the available ones if it is none of them."""
    if codec not in get_args(Codec):
        raise ValueError(f"codec {codec!r}: use one of {', '.join(get_args(Codec))}")
    return codec  # type: ignore[return-value]


def codec_settings(codec: Codec) -> dict[str, Any]:
    """The settings that, with the pixels, determine the bytes: for the group's config. Empty for raw."""
    return dict(_SETTINGS.get(codec, {}))


def encode(pixels: np.ndarray, codec: Codec) -> bytes:
    """The stored bytes of uint8 RGB (height, width, 3); raw, png and webp are lossless, jpeg is not."""
    if codec == "raw":
        return pixels.tobytes()
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, codec, **_SETTINGS[codec])
    return buffer.getvalue()


def decode(data: np.ndarray, codec: Codec, shape: Shape) -> np.ndarray:
    """uint8 RGB (height, width, 3) of this shape from the bytes of an encoded image, uint8 (n,).

    Raises:
        ValueError: not a complete image of this codec and shape.
    """
    from PIL import Image

    height, width = shape
    try:
        with Image.open(io.BytesIO(data.tobytes()), formats=[codec]) as image:
            if image.mode != "RGB" or image.size != (width, height):
                raise ValueError(
                    f"{image.mode} of {image.width} x {image.height} px, not RGB of {width} x {height} px"
                )
            return np.asarray(image)
    except (OSError, SyntaxError) as error:  # SyntaxError: Pillow, about a broken PNG chunk
        raise ValueError(str(error)) from error
