"""PNG files with long texts and profiles are images like others, and Pillow's limits stay as they are."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from stages.images import ImageRejected, decode_rgb

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
LONG = "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1)


def png(info: PngImagePlugin.PngInfo | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG", pnginfo=info, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return decode_rgb(data, max_pixels=10**6).pixels


def is_rejected_by_pillow(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("after_data", [False, True])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt"])
def test_a_long_compressed_text_is_no_obstacle(kind: str, after_data: bool) -> None:
    info = PngImagePlugin.PngInfo()
    if after_data:
        body = b"prompt\0\0" if kind == "zTXt" else b"prompt\0\1\0\0\0"
        info.add(kind.encode(), body + zlib.compress(LONG.encode()), after_idat=True)
    elif kind == "zTXt":
        info.add_text("prompt", LONG, zip=True)
    else:
        info.add_itxt("prompt", LONG, zip=True)
    data = png(info)
    assert after_data or is_rejected_by_pillow(data)
    assert (pixels(data) == PIXELS).all()


def test_much_text_is_no_obstacle() -> None:
    info = PngImagePlugin.PngInfo()
    for number in range(66):
        info.add_text(f"text {number}", "x" * 2**20)
    data = png(info)
    assert is_rejected_by_pillow(data)
    assert (pixels(data) == PIXELS).all()


def test_a_long_text_leaves_the_orientation_in_other_chunks() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>', zip=True)
    info.add_text("prompt", LONG, zip=True)
    assert (pixels(png(info)) == np.rot90(PIXELS, -1)).all()
    exif = Image.Exif()
    exif[274] = 3
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", LONG, zip=True)
    assert (pixels(png(info, exif=exif)) == np.rot90(PIXELS, 2)).all()


def test_a_long_profile_is_used() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert profile[16:20] == b"Lab "
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"-XYZ").replace(b"gXYZ", b"rXYZ").replace(b"-XYZ", b"gXYZ")
    padded = swapped + bytes(PngImagePlugin.MAX_TEXT_CHUNK)
    padded = len(padded).to_bytes(4, "big") + padded[4:]
    data = png(icc_profile=padded)
    assert is_rejected_by_pillow(data)
    assert (pixels(data) == pixels(png(icc_profile=swapped))).all()
    assert np.abs(pixels(data).astype(int) - PIXELS).max() > 20


def test_a_profile_without_end_is_ignored() -> None:
    data = png(icc_profile=bytes(17 * 2**20))
    assert (pixels(data) == PIXELS).all()


def test_a_cut_file_with_a_long_text_is_truncated() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", LONG, zip=True)
    data = png(info)
    for length in (len(data) - 60, len(data) - 100):
        with pytest.raises(ImageRejected, match="truncated"):
            pixels(data[:length])


def test_limits_of_pillow_are_left_alone() -> None:
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", LONG, zip=True)
    pixels(png(info))
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
