"""Every kind of image must decode to the values a reference gives, every bad file to its reason."""

import io
import pickle
import resource
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, features

from stages.images import ImageRejected, RejectReason, decode_rgb
from stages.images.decode import BYTES_PER_PIXEL

LIMIT = 10**6


def image(height: int = 24, width: int = 40) -> np.ndarray:
    """Asymmetric colours: every pixel is different and no flip or turn maps the image onto itself."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x * y) % 256], axis=-1).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    return decode_rgb(data, max_pixels=LIMIT).pixels


def over_white(image: Image.Image) -> np.ndarray:
    rgba = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


def outcome(data: bytes) -> np.ndarray | RejectReason:
    try:
        return decode(data)
    except ImageRejected as rejected:
        return rejected.reason


def rejection(data: bytes, max_pixels: int = LIMIT) -> RejectReason:
    with pytest.raises(ImageRejected) as caught:
        decode_rgb(data, max_pixels=max_pixels)
    assert caught.value.detail
    return caught.value.reason


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG from raw filtered rows; `extra` goes between header and data."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


# ---- formats ----

LOSSLESS = ["PNG", "BMP", "TIFF", "PPM"]


@pytest.mark.parametrize("format", LOSSLESS)
def test_lossless_formats_keep_every_value(format):
    decoded = decode_rgb(encode(image(), format), max_pixels=LIMIT)
    assert decoded.format == format
    assert (decoded.width, decoded.height) == (40, 24)
    assert (decoded.pixels == image()).all()
    assert decoded.pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {"quality": 90}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("GIF", {}), ("AVIF", {})],
)
def test_other_formats_equal_pillow(format, options):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = encode(image(), format, **options)
    assert (decode(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
    assert decode_rgb(data, max_pixels=LIMIT).format == format


def test_mpo_gives_its_first_image():
    data = encode(image(), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 24), "red")])
    assert (decode(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP"])
def test_animation_gives_its_first_frame(format):
    first = Image.new("RGB", (16, 8), (255, 0, 0))
    second = Image.new("RGB", (16, 8), (0, 0, 255))
    data = encode(first, format, save_all=True, append_images=[second], duration=100)
    assert Image.open(io.BytesIO(data)).n_frames == 2  # pyright: ignore[reportAttributeAccessIssue]
    assert np.abs(decode(data).astype(int) - [255, 0, 0]).max() <= 3  # WebP is lossy


def test_one_pixel_decodes():
    assert decode(encode(np.array([[[1, 2, 3]]], np.uint8), "PNG")).tolist() == [[[1, 2, 3]]]


# ---- orientation ----

UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    stored = decode(encode(image(), format, **options))
    decoded = decode_rgb(encode(image(), format, exif=exif.tobytes(), **options), max_pixels=LIMIT)
    expected = UPRIGHT[orientation](stored)
    assert (decoded.height, decoded.width) == expected.shape[:2]
    assert (decoded.pixels == expected).all()


@pytest.mark.parametrize("orientation", [0, 9, 200])
def test_unknown_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decode(encode(image(), "PNG", exif=exif.tobytes())) == image()).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_broken_exif_does_not_lose_the_image(exif):
    data = encode(image(), "JPEG", exif=exif)
    assert (decode(data) == decode(encode(image(), "JPEG"))).all()


# ---- transparency ----


def test_every_alpha_over_white_is_exact():
    """All 256 x 256 pairs of colour and alpha."""
    colour, alpha = np.mgrid[:256, :256].astype(np.uint8)
    rgba = np.stack([colour, 255 - colour, colour // 2, alpha], axis=-1)
    out = decode(encode(rgba, "PNG")).astype(int)
    assert (out == over_white(Image.fromarray(rgba))).all()
    exact = (rgba[..., :3].astype(float) * alpha[..., None] + 255.0 * (255 - alpha[..., None].astype(int))) / 255
    assert np.abs(out - exact).max() <= 0.51


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_rgba_equals_pillow_composite(format):
    rgba = Image.fromarray(image())
    rgba.putalpha(Image.linear_gradient("L").resize((40, 24)))
    data = encode(rgba, format, **({"lossless": True} if format == "WEBP" else {}))
    assert (decode(data) == over_white(Image.open(io.BytesIO(data)))).all()


def test_grey_with_alpha_equals_pillow_composite():
    la = Image.fromarray(image()[..., 0]).convert("LA")
    la.putalpha(Image.fromarray(image()[..., 1]))
    assert (decode(encode(la, "PNG")) == over_white(la)).all()


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 16))], ids=["index", "table"])
def test_palette_with_transparency_equals_pillow_composite(transparency):
    data = encode(Image.fromarray(image()).quantize(16), "PNG", transparency=transparency)
    reference = Image.open(io.BytesIO(data))
    assert reference.mode == "P"
    assert "transparency" in reference.info
    assert (decode(data) == over_white(reference)).all()
    assert (decode(data) == 255).all(axis=-1).any()


def test_gif_transparency_becomes_white():
    image = Image.fromarray(np.repeat(np.arange(4, dtype=np.uint8)[None], 4, axis=0), "L").convert("P")
    image.putpalette([10, 10, 10, 20, 20, 20, 30, 30, 30, 40, 40, 40])
    assert decode(encode(image, "GIF", transparency=2))[0, :, 0].tolist() == [10, 20, 255, 40]


def test_transparent_colour_of_rgb_and_grey_becomes_white():
    rgb = np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8)
    assert decode(encode(rgb, "PNG", transparency=(40, 50, 60))).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    grey = np.array([[7, 9]], np.uint8)
    assert decode(encode(grey, "PNG", transparency=7))[0, :, 0].tolist() == [255, 9]


# ---- modes ----


def test_grey_becomes_three_equal_channels():
    grey = image()[..., 0]
    assert (decode(encode(grey, "PNG")) == grey[..., None]).all()


def test_one_bit_becomes_black_and_white():
    bits = image()[..., 0] > 100
    assert (decode(encode(Image.fromarray(bits), "PNG")) == np.where(bits, 255, 0)[..., None]).all()


@pytest.mark.parametrize("container", ["PNG", "TIFF", "PPM", "big-endian TIFF"])
def test_16_bit_grey_keeps_the_high_byte(container):
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(16, 64)
    if container == "big-endian TIFF":
        data = encode(Image.frombytes("I;16B", (64, 16), ramp.astype(">u2").tobytes()), "TIFF")
    else:
        data = encode(ramp, container)
    assert (decode(data) == (ramp >> 8)[..., None]).all()


def test_transparent_value_of_16_bit_grey_becomes_white():
    rows = b"\0" + struct.pack(">3H", 0, 0x1234, 0x1235)
    data = png(3, 1, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 0x1234)))
    assert decode(data)[0, :, 0].tolist() == [0, 255, 0x12]


def test_16_bit_colour_keeps_the_high_byte():
    data = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0x01FF, 0x8000, 0xFFFF, 0x1234, 0x5678, 0x9ABC))
    assert decode(data).tolist() == [[[0x01, 0x80, 0xFF], [0x12, 0x56, 0x9A]]]


def test_cmyk_jpeg_equals_pillow():
    data = encode(Image.fromarray(image()).convert("CMYK"), "JPEG", quality=95)  # Pillow writes Adobe's inverted
    reference = Image.open(io.BytesIO(data))
    assert reference.mode == "CMYK"
    assert (decode(data) == np.asarray(reference.convert("RGB"))).all()
    assert np.abs(decode(data).astype(int) - image()).mean() < 12  # not a negative


def test_lab_tiff_becomes_srgb():
    colours = Image.new("RGB", (4, 4), (200, 60, 30))
    lab = ImageCms.profileToProfile(
        colours, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    assert np.abs(decode(encode(lab, "TIFF")).astype(int) - (200, 60, 30)).max() <= 3


# ---- colour profiles ----


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


SRGB_RED, SRGB_GREEN, SRGB_BLUE = (0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7142)
D50 = (0.9642, 1.0, 0.8249)


def icc(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """A version 2 ICC profile holding `tags`."""
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50), **tags}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    tags[b"cprt"] = b"text\0\0\0\0none\0"
    table, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", offset + len(body), len(value))
        body += value
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(
        ">I4sI4s4s4s12x4s28x", 128 + len(table + body), b"lcms", 0x02100000, kind, space, connection, b"acsp"
    )
    header = (header + fixed(*D50)).ljust(128, b"\0")
    return header + table + body


def rgb_profile(gamma: float, red=SRGB_RED, green=SRGB_GREEN, blue=SRGB_BLUE) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    colorants = {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue}
    tags = {name: b"XYZ \0\0\0\0" + fixed(*value) for name, value in colorants.items()}
    return icc(b"RGB ", {**tags, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def srgb_curve(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1: linear 0..1 to sRGB 0..255."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_linear_profile_gives_the_srgb_curve(format):
    data = encode(image(), format, icc_profile=rgb_profile(gamma=1.0))
    assert np.abs(decode(data) - srgb_curve(image() / 255)).max() <= 1


def test_profile_with_swapped_primaries_swaps_the_channels():
    profile = rgb_profile(2.2, red=SRGB_GREEN, green=SRGB_RED)
    plain = decode(encode(image(), "PNG", icc_profile=rgb_profile(2.2)))
    swapped = decode(encode(image()[..., [1, 0, 2]], "PNG", icc_profile=profile))
    assert np.abs(swapped.astype(int) - plain).max() <= 1


def test_profile_conversion_equals_perceptual_littlecms():
    profile = rgb_profile(2.2, red=(0.6097, 0.3111, 0.0195), green=(0.2053, 0.6257, 0.0609))  # Adobe RGB
    expected = ImageCms.profileToProfile(
        Image.fromarray(image()),
        ImageCms.getOpenProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.PERCEPTUAL,
    )
    out = decode(encode(image(), "PNG", icc_profile=profile))
    assert (out == np.asarray(expected)).all()
    assert np.abs(out.astype(int) - image()).max() > 20


def test_grey_profile_gives_the_srgb_curve():
    profile = icc(b"GRAY", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, 256)})
    grey = np.arange(256, dtype=np.uint8)[None]
    out = decode(encode(grey, "PNG", icc_profile=profile))
    assert np.abs(out - srgb_curve(grey / 255)[..., None]).max() <= 0.51


def test_cmyk_profile_is_used():
    """A lut8 profile (ICC.1:2022, 10.11) that maps paper to white and any full ink to L* = 0."""
    identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    corners = b"".join(bytes([255 if ink == 0 else 0, 128, 128]) for ink in range(16))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + bytes(range(256)) * 4 + corners + bytes(range(256)) * 3
    profile = icc(b"CMYK", {b"A2B0": lut}, connection=b"Lab ")
    ink = np.zeros((8, 24, 4), np.uint8)
    ink[:, 8:16, 0] = 255  # cyan
    ink[:, 16:, 3] = 255  # black
    image = Image.frombytes("CMYK", (24, 8), ink.tobytes())
    out = decode(encode(image, "TIFF", icc_profile=profile))[4, [4, 12, 20]].astype(int)
    assert np.abs(out - [[255] * 3, [0] * 3, [0] * 3]).max() <= 3
    assert decode(encode(image, "TIFF"))[4, 12].tolist() == [0, 255, 255]


def test_profile_and_alpha_work_together():
    profile = rgb_profile(1.0)
    rgba = np.dstack([image(), np.full((24, 40), 128, np.uint8)])
    opaque = decode(encode(image(), "PNG", icc_profile=profile))
    expected = over_white(Image.fromarray(np.dstack([opaque, rgba[..., 3]])))
    assert (decode(encode(rgba, "PNG", icc_profile=profile)) == expected).all()


def test_srgb_profile_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (decode(encode(image(), "PNG", icc_profile=profile)) == image()).all()


@pytest.mark.parametrize(
    "profile",
    [
        b"not a profile",
        rgb_profile(1.0)[:200],
        rgb_profile(1.0)[:128] + bytes(100),
        icc(b"GRAY", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, 256)}),
    ],
    ids=["text", "cut", "no tags", "of another colour space"],
)
def test_unusable_profile_is_ignored(profile):
    assert (decode(encode(image(), "PNG", icc_profile=profile)) == image()).all()


def test_threads_share_profiles_safely():
    data = encode(image(), "PNG", icc_profile=rgb_profile(1.8))
    expected = decode(data)
    with ThreadPoolExecutor(4) as pool:
        assert all((out == expected).all() for out in pool.map(decode, [data] * 64))


# ---- bad files ----


def test_no_bytes_is_empty_file():
    assert rejection(b"") == "empty_file"


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
        b"just text",
        b"\0" * 100,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        b"\xff\xd8",
    ],
    ids=["html", "svg", "text", "zeros", "eps", "two bytes of a jpeg"],
)
def test_other_content_is_not_an_image(data):
    assert rejection(data) == "not_an_image"


@pytest.mark.parametrize("format", ["ICO", "TGA", "PCX", "EPS", "JPEG2000"])
def test_formats_outside_the_list_are_not_images(format):
    assert rejection(encode(image(), format)) == "not_an_image"


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("PPM", {}),
    ],
)
def test_cut_file_is_truncated(format, options):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, format, **options)
    for part in (0.5, 0.75, 0.97):
        assert rejection(data[: int(len(data) * part)]) == "truncated", part


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_no_cut_gives_a_damaged_image(format):
    """Whatever the length: either a rejection or, where only a trailer is missing, every pixel."""
    data = encode(image(), format)
    whole = decode(data)
    for length in range(len(data)):
        result = outcome(data[:length])
        if isinstance(result, RejectReason):
            assert result != "too_many_pixels"
        else:
            assert (result == whole).all(), length


def test_flipped_bits_in_a_png_are_a_decode_error():
    data = bytearray(encode(image(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert rejection(bytes(data)) == "decode_error"


def test_random_damage_raises_nothing_else():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP"):
        whole = encode(image(), format)
        for _ in range(150):
            data = bytearray(whole)
            for position in rng.integers(0, len(data), 4):
                data[position] = rng.integers(256)
            result = outcome(bytes(data))
            assert isinstance(result, RejectReason) or result.shape[2] == 3


def huge(format: str) -> bytes:
    """A small file whose header says 30,000 x 30,000."""
    small = bytearray(encode(image(), format))
    match format:
        case "PNG":
            return png(30_000, 30_000, 8, 2, bytes(1000))
        case "JPEG":
            start = small.index(b"\xff\xc0")
            small[start + 5 : start + 9] = struct.pack(">HH", 30_000, 30_000)
        case "GIF":
            small[6:10] = struct.pack("<HH", 30_000, 30_000)
        case "BMP":
            small[18:26] = struct.pack("<ii", 30_000, 30_000)
        case "PPM":
            return b"P6 30000 30000 255\n" + bytes(1000)
    return bytes(small)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "PPM"])
def test_bomb_is_rejected_from_its_header(format):
    data = huge(format)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    assert rejection(data, max_pixels=100_000_000) == "too_many_pixels"
    assert time.process_time() - start < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 50 * 1024


def test_size_limit_is_inclusive():
    data = encode(image(), "PNG")
    assert decode_rgb(data, max_pixels=24 * 40).width == 40
    assert rejection(data, max_pixels=24 * 40 - 1) == "too_many_pixels"


@pytest.mark.parametrize(
    ("format", "mode", "options", "weight"),
    [
        ("PNG", "RGBA", {}, 1),
        ("JPEG", "RGB", {}, 1),
        ("JPEG", "RGB", {"progressive": True}, 1),
        ("JPEG", "CMYK", {"progressive": True}, 1.2),
        ("WEBP", "RGB", {}, 2),
        ("AVIF", "RGB", {}, 1.6),
        ("TIFF", "RGB", {}, 1),
    ],
)
def test_a_pixel_counts_as_much_as_its_decoder_needs(format, mode, options, weight):
    data = encode(Image.new(mode, (40, 30)), format, **options)
    counted = round(40 * 30 * weight)
    assert decode_rgb(data, max_pixels=counted).format == format
    assert rejection(data, max_pixels=counted - 1) == "too_many_pixels"


def test_tiles_of_a_large_image_are_put_together_as_the_whole():
    rng = np.random.default_rng(0)
    values = np.kron(rng.integers(0, 256, (130, 90, 4), dtype=np.uint8), np.ones((10, 10, 1), np.uint8))
    values[:700, :, 3] = 255  # the first tiles are opaque
    found = decode_rgb(encode(Image.fromarray(values), "PNG", compress_level=1), max_pixels=10**7).pixels
    colour, alpha = values[..., :3].astype(int), values[..., 3:].astype(int)
    assert np.abs(found - (colour * alpha + 255 * (255 - alpha)) / 255).max() <= 1
    assert (found[:700] == values[:700, :, :3]).all()


MEASURE = """
import resource, sys
from stages.images import center_square, decode_rgb, pyramid
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, large = (open(path, "rb").read() for path in sys.argv[1:])
def use(data):
    return pyramid(center_square(decode_rgb(data, max_pixels=10**9).pixels), [64, 256])
use(small)
before = peak()
use(large)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "mode", "options", "weight"),
    [
        ("PNG", "RGBA", {"compress_level": 1}, 1),
        ("JPEG", "CMYK", {"progressive": True}, 1.2),
        ("WEBP", "RGBA", {"lossless": True, "quality": 0, "method": 0}, 2),
        ("AVIF", "RGBA", {"speed": 10}, 1.6),
        ("TIFF", "F", {"compression": "tiff_lzw"}, 1),
    ],
)
def test_memory_stays_under_ten_bytes_per_counted_pixel(tmp_path, format, mode, options, weight):
    side = 4500
    for name, size in (("small", 300), ("large", side)):
        colour = 0.5 if mode == "F" else (120,) * len(Image.new(mode, (1, 1)).getbands())
        (tmp_path / name).write_bytes(encode(Image.new(mode, (size, size), colour), format, **options))
    command = [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    tiles_bytes = 2**20 * 24
    assert int(found.stdout) <= BYTES_PER_PIXEL * weight * side * side + tiles_bytes


def test_only_the_given_limit_counts(monkeypatch):
    """Pillow's own limit neither warns (warnings are errors here) nor rejects, and is left alone."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for format in ("PNG", "JPEG", "BMP", "GIF", "PPM"):
        assert decode(encode(image(), format)).shape == (24, 40, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_hiding_cut_images_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        decode(encode(image(), "PNG"))


def test_rejection_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageRejected(RejectReason.TRUNCATED, "why")))
    assert (error.reason, error.detail, str(error)) == ("truncated", "why", "truncated: why")
