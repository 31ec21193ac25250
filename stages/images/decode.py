"""Decode an image of any common format to upright sRGB pixels, or say why it cannot be used.

The plugin of each allowed format is called directly, not through `Image.open`: no other parser (EPS starts
ghostscript) is ever reached, and Pillow's process-wide bomb limit gives way to the caller's `max_pixels`.

Not corrected: a JPEG that was truncated and then closed with an end marker decodes with a gray rest (libjpeg only
warns and Pillow does not pass that on), and the PNG chunks gAMA, cHRM and cICP are ignored.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)
from PIL.ExifTags import Base as ExifTag

from stages.images import deep_gray
from stages.images.png_chunks import without_long_chunks
from stages.images.rejection import ImageRejected, RejectReason
from stages.images.tiles import box, tiles

BYTES_PER_PIXEL = 10
"""Memory that decoding takes at most, per pixel of `max_pixels`: 4 bytes as Pillow holds a pixel, 3 as the result, and
what the decoder or the conversion of colours needs."""
_DECODER_BYTES = {"WEBP": 20, "AVIF": 16}
"""Where it is more, as measured with Pillow 12 and 13: libwebp holds two frames beside Pillow's two copies."""
_TIFF_BITS = 258


@dataclass(frozen=True)
class Decoded:
    """A decoded image; width and height are the ones after the EXIF orientation was applied."""

    pixels: np.ndarray
    """uint8 (height, width, 3), sRGB, read-only."""
    width: int
    height: int
    format: str


def decode_rgb(data: bytes, *, max_pixels: int, orientation: int | None = None) -> Decoded:
    """Decode the first frame to upright sRGB on white.

    Transparency is put on white, an embedded colour profile is converted to sRGB (perceptual intent; a broken
    or unfitting profile is ignored) and 16-bit values keep their high byte. Grayscale that is signed, float or of
    another depth is scaled by the range that the file states; see `stages.images.deep_gray`.

    Args:
        max_pixels: largest width times height. A format whose decoder takes more than BYTES_PER_PIXEL counts each
            pixel several times, so that memory is at most BYTES_PER_PIXEL * max_pixels for every format.
        orientation: EXIF orientation (1 to 8) that is known from elsewhere; used where the file itself has none.
    Raises:
        ImageRejected: the image is unusable. Size is checked before any pixel is decoded.
    """
    if not data:
        raise ImageRejected(RejectReason.EMPTY_FILE, "0 bytes")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which hides truncated images; turn it off")

    name, plugin = _plugin_for(data)
    try:
        image = _load(name, plugin, data, max_pixels)
        pixels = _upright(_to_rgb(image), _orientation_of(image, orientation))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRejected(RejectReason.TOO_MANY_PIXELS, str(error)) from error
    except _DECODE_ERRORS as error:
        raise ImageRejected(_reason_of(error, data), f"{name}: {type(error).__name__}: {error}"[:200]) from error
    return Decoded(pixels, width=pixels.shape[1], height=pixels.shape[0], format=name)


def _load(name: str, plugin: "_Plugin", data: bytes, max_pixels: int) -> Image.Image:
    """The image with its pixels; where Pillow refuses a good one, the same image in a form that it reads."""
    try:
        return _open(plugin, data, max_pixels)
    except (ValueError, SyntaxError) as error:
        if name == "PNG" and "MAX_TEXT" in str(error):
            shorter, profile = without_long_chunks(data)
            image = _open(plugin, shorter, max_pixels)
            image.info.update({} if profile is None else {"icc_profile": profile})
            return image
        if name == "TIFF" and "unknown pixel mode" in str(error):
            unpacked = deep_gray.read_packed(data, max_pixels)
            if unpacked is not None:
                return unpacked
        raise


def _open(plugin: "_Plugin", data: bytes, max_pixels: int) -> Image.Image:
    image = plugin(io.BytesIO(data))
    weight = _weight(image)
    if image.width * image.height * weight > max_pixels:
        each = "" if weight == 1 else f", each of which counts as {weight:g} ({image.format}),"
        detail = f"{image.width} x {image.height}{each} is over {max_pixels} pixels"
        raise ImageRejected(RejectReason.TOO_MANY_PIXELS, detail)
    image.decodermaxblock = max(image.decodermaxblock, len(data))  # the decoder gets all at once
    image.load()
    return image


def _weight(image: ImageFile.ImageFile) -> float:
    """How many pixels a pixel counts as: more than one where its decoder takes more than BYTES_PER_PIXEL."""
    needed = _DECODER_BYTES.get(image.format or "", 0)
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.info.get("progressive"):
        needed = 4 + 2 * len(image.getbands())  # libjpeg holds all coefficients
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(_TIFF_BITS, 1)
        needed = 4 + sum(bits if isinstance(bits, tuple) else (bits,)) / 8  # a strip may be all of it
    return max(1.0, needed / BYTES_PER_PIXEL)


# What Pillow's parsers raise for damaged files. MemoryError is left out: callers know what else takes memory.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    UserWarning,  # only where warnings are errors
    struct.error,
    zlib.error,
)


def _reason_of(error: Exception, data: bytes) -> RejectReason:
    ended_early = isinstance(error, EOFError) or "truncated" in str(error).lower()
    short_riff = data[:4] == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little")  # WebP
    return RejectReason.TRUNCATED if ended_early or short_riff else RejectReason.DECODE_ERROR


# ---- format ----

_Plugin = Callable[[io.BytesIO], ImageFile.ImageFile]


def _plugins() -> list[tuple[re.Pattern[bytes], str, _Plugin]]:
    plugins: list[tuple[bytes, str, _Plugin]] = [
        (rb"\xff\xd8\xff", "JPEG", JpegImagePlugin.JpegImageFile),  # of an MPO file: its first image
        (rb"\x89PNG\r\n\x1a\n", "PNG", PngImagePlugin.PngImageFile),
        (rb"RIFF.{4}WEBP", "WEBP", WebPImagePlugin.WebPImageFile),
        (rb"GIF8[79]a", "GIF", GifImagePlugin.GifImageFile),
        (rb"BM", "BMP", BmpImagePlugin.BmpImageFile),
        (rb"II[*+]\0|MM\0[*+]", "TIFF", TiffImagePlugin.TiffImageFile),
        (rb"P[1-6][\s#]", "PPM", PpmImagePlugin.PpmImageFile),
    ]
    if features.check("avif"):
        from PIL import AvifImagePlugin

        plugins.append((rb".{4}ftyp(avif|avis|mif1|msf1)", "AVIF", AvifImagePlugin.AvifImageFile))
    return [(re.compile(magic, re.DOTALL), name, plugin) for magic, name, plugin in plugins]


_PLUGINS = _plugins()


def _plugin_for(data: bytes) -> tuple[str, _Plugin]:
    for magic, name, plugin in _PLUGINS:
        if magic.match(data):
            return name, plugin
    raise ImageRejected(RejectReason.NOT_AN_IMAGE, f"no known image format, starts with {data[:16]!r}")


# ---- orientation ----


def _orientation_of(image: Image.Image, known: int | None) -> int | None:
    """The EXIF orientation of a loaded image, or else the known one.

    Pillow turns a TIFF while loading it, and removes the tag.
    """
    try:
        orientation = image.getexif().get(ExifTag.Orientation)
    except (SyntaxError, ValueError, LookupError, TypeError, OSError, EOFError, struct.error, UserWarning):
        orientation = None  # broken EXIF is not a broken image
    if orientation is None and not isinstance(image, TiffImagePlugin.TiffImageFile):
        orientation = known
    return orientation if isinstance(orientation, int) else None


def _upright(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    """A read-only view of (height, width, 3) pixels, turned by an EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    pixels = pixels.view()
    pixels.flags.writeable = False
    return pixels


# ---- colour ----

_PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK", "LAB": "Lab "}
"""Modes that convert to sRGB through a profile, with the name of that colour space in an ICC header."""


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Any mode to uint8 (height, width, 3), sRGB on white; tile by tile, as colours take many bytes on their way."""
    profile = image.info.get("icc_profile")
    profile = profile if isinstance(profile, bytes) else b""
    deep = deep_gray.to_gray(image) if deep_gray.is_deep(image) else None
    parts = list(tiles(image.height, image.width))
    if len(parts) == 1:
        return np.asarray(_part_to_rgb(image, deep, profile))
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for tile in parts:
        gray = deep and (deep[0].crop(box(tile)), deep[1] and deep[1].crop(box(tile)))
        pixels[tile] = np.asarray(_part_to_rgb(image.crop(box(tile)), gray, profile))
    return pixels


def _part_to_rgb(
    part: Image.Image, deep: tuple[Image.Image, Image.Image | None] | None, profile: bytes
) -> Image.Image:
    """A part of an image, or all of it.

    Args:
        deep: of gray values with more than 8 bits, the same part with 8, and its alpha.
    """
    colour, alpha = deep or _split_alpha(part)
    return _on_white(_apply_profile(colour, profile), alpha)


def _on_white(rgb: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is None or alpha.getextrema()[0] == 255:
        return rgb
    rgb.putalpha(alpha)
    white = Image.new("RGBA", rgb.size, "white")
    return Image.alpha_composite(white, rgb).convert("RGB")


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """8-bit colour in mode L, RGB, CMYK or LAB, and 8-bit alpha where the image has any."""
    if not image.has_transparency_data:
        if image.mode not in _PROFILE_SPACES:
            image = image.convert("L" if image.mode == "1" else "RGB")
        return image, None
    with_alpha = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
    return with_alpha.convert(with_alpha.mode[:-1]), with_alpha.getchannel("A")


def _apply_profile(colour: Image.Image, profile: bytes) -> Image.Image:
    """L, RGB, CMYK or LAB to sRGB, through the embedded profile where it can be used."""
    if colour.mode == "L" and _profile_space(profile) == "RGB ":
        colour = colour.convert("RGB")
    transform = _transform_to_srgb(profile, colour.mode)
    if transform is not None:
        return transform.apply(colour)
    return colour if colour.mode == "RGB" else colour.convert("RGB")


def _profile_space(profile: bytes) -> str:
    """Colour space field of an ICC header (ICC.1:2022, 7.2.6)."""
    return profile[16:20].decode("latin-1")


@lru_cache(maxsize=32)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform from a profile to sRGB; None where the profile is absent, broken, unfitting or is sRGB."""
    if mode != "LAB" and _profile_space(profile) != _PROFILE_SPACES[mode]:
        return None
    try:
        transform = ImageCms.buildTransform(
            ImageCms.createProfile("LAB") if mode == "LAB" else ImageCms.getOpenProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.PERCEPTUAL,
            # The shortcut LittleCMS takes for 8-bit grayscale is up to 10 levels off in the shadows.
            flags=ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE,
        )
    except ImageCms.PyCMSError:
        return None
    return None if mode == "RGB" and _is_identity(transform) else transform


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a grid of colours stays as it is, to one level: then the profile is a kind of sRGB."""
    steps = np.arange(0, 256, 15, dtype=np.uint8)  # 0, 15 .. 255
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, len(steps), 3)
    out = np.asarray(transform.apply(Image.fromarray(grid)))
    return int(np.abs(out.astype(int) - grid).max()) <= 1
