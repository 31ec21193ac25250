"""Grayscale of every depth has the range that its file states, or is rejected."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from stages.images import ImageRejected, decode_rgb

SMIN, SMAX = 340, 341
RAMP = np.arange(256).reshape(16, 16)


def tiff(values: np.ndarray, minimum: float | None = None, maximum: float | None = None, type: int = 12) -> bytes:
    """A TIFF as Pillow, and so `datasets`, writes an array; with SMinSampleValue and SMaxSampleValue if given."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in ((SMIN, minimum), (SMAX, maximum)):
        if value is not None:
            tags[tag], tags.tagtype[tag] = value, type
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", tiffinfo=tags)
    return buffer.getvalue()


def raw_tiff(
    rows: bytes, width: int, height: int, bits: int, sample_format: int = 1, photometric: int = 1, order: str = "<"
) -> bytes:
    """An uncompressed TIFF of one strip and one sample per pixel."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 0)]
    entries += [(277, 3, 1), (278, 4, height), (279, 4, len(rows)), (339, 3, sample_format)]
    start = 8 + 2 + 12 * len(entries) + 4
    table = struct.pack(order + "H", len(entries))
    for tag, kind, value in entries:
        value = start if tag == 273 else value
        table += struct.pack(order + "HHI", tag, kind, 1)
        table += struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
    magic = b"II" if order == "<" else b"MM"
    return magic + struct.pack(order + "HI", 42, 8) + table + bytes(4) + rows


def packed(values: np.ndarray, bits: int) -> bytes:
    """Each row of values as bits, the highest first, filled up to a byte."""
    as_bits = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(as_bits.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def gray(data: bytes) -> np.ndarray:
    pixels = decode_rgb(data, max_pixels=10**6).pixels
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def rejection(data: bytes) -> str:
    with pytest.raises(ImageRejected) as caught:
        decode_rgb(data, max_pixels=10**6)
    assert caught.value.reason == "unsupported_range"
    return caught.value.detail


@pytest.mark.parametrize("maximum", [1, 7, 100, 255, 256, 1023, 4095, 16383, 40000, 65535])
@pytest.mark.parametrize("is_text", [False, True])
def test_a_pgm_of_any_maximum_reaches_from_black_to_white(maximum: int, is_text: bool) -> None:
    values = np.linspace(0, maximum, 60).round().astype(int).reshape(6, 10)
    if is_text:
        body = " ".join(map(str, values.flat)).encode() + b"\n"
    else:
        body = values.astype(">u2" if maximum > 255 else np.uint8).tobytes()
    data = f"P{2 if is_text else 5}\n10 6\n{maximum}\n".encode() + body
    assert np.abs(gray(data) - values * 255.0 / maximum).max() <= 1
    assert (gray(data).min(), gray(data).max()) == (0, 255)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", range(9, 16))
def test_a_tiff_of_packed_bits_keeps_the_high_eight(bits: int, order: str) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (7, 13))
    data = raw_tiff(packed(values, bits), 13, 7, bits, order=order)
    assert (gray(data) == values >> (bits - 8)).all()


def test_packed_bits_whose_zero_is_white_are_inverted() -> None:
    values = np.random.default_rng(0).integers(0, 1024, (7, 12))
    assert (gray(raw_tiff(packed(values, 10), 12, 7, 10, photometric=0)) == 255 - (values >> 2)).all()


def test_packed_bits_obey_the_size_limit() -> None:
    data = raw_tiff(packed(np.ones((7, 12), int), 10), 12, 7, 10)
    with pytest.raises(ImageRejected, match="too_many_pixels: 12 x 7"):
        decode_rgb(data, max_pixels=83)


def test_16_bits_whose_zero_is_white_are_inverted() -> None:
    values = np.arange(256, dtype="<u2") * 256
    assert (gray(raw_tiff(values.tobytes(), 256, 1, 16, photometric=0)) == 255 - np.arange(256)).all()


def test_unsigned_integers_of_32_bits_have_the_range_of_their_bits() -> None:
    values = np.array([0, 2**24, 2**31, 2**32 - 1], "<u4")
    assert gray(raw_tiff(values.tobytes(), 4, 1, 32)).tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [(np.array([[0, 100, 255]], np.int32), [0, 100, 255]), (np.array([[-5, 0, 300]], np.int32), [0, 0, 255])],
)
def test_integers_have_the_range_that_tags_state(values: np.ndarray, expected: list[int]) -> None:
    assert gray(tiff(values, 0, 255)).tolist() == [expected]
    assert gray(tiff(values, 0, 255, type=4)).tolist() == [expected]


def test_other_ranges_of_tags_are_scaled_from_black_to_white() -> None:
    assert gray(tiff(np.array([[-100, 0, 100]], np.int32), -100, 100)).tolist() == [[0, 128, 255]]
    assert gray(tiff(np.array([[-1, 0, 1]], np.float32), -1, 1)).tolist() == [[0, 128, 255]]
    assert gray(tiff((RAMP * 16 + 15).astype(np.uint16), 0, 4095)).tolist() == RAMP.tolist()


def test_signed_integers_without_tags_are_rejected() -> None:
    """As `datasets` stores an array of integers: 0..255 would be black."""
    assert "signed integers" in rejection(tiff(RAMP.astype(np.int32)))
    assert "signed integers" in rejection(raw_tiff(RAMP.astype(np.int16).tobytes(), 16, 16, 16, sample_format=2))
    assert "signed integers" in rejection(raw_tiff(RAMP.astype(np.int8).tobytes(), 16, 16, 8, sample_format=2))


def test_floats_from_0_to_1_are_rounded() -> None:
    assert gray(tiff(np.array([[0, 0.25, 0.5, 1.0, 1.001]], np.float32))).tolist() == [[0, 64, 128, 255, 255]]


@pytest.mark.parametrize(
    ("values", "detail"),
    [
        ([0, 128, 255], "floats from 0 to 255"),
        ([-1, 0, 1], "floats from -1 to 1"),
        ([0, np.nan, 1], "not finite"),
        ([0, np.inf, 1], "not finite"),
        ([-np.inf, 0, 1], "not finite"),
    ],
)
def test_other_floats_are_rejected(values: list[float], detail: str) -> None:
    """As `datasets` stores an array of floats: 0..255 would be white."""
    assert detail in rejection(tiff(np.array([values], np.float32)))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_what_would_be_black_altogether_is_rejected(dtype: type) -> None:
    """8-bit values in an array of 16 bits; an image that is black stays one."""
    scale = 1e-6 if dtype == np.float32 else 1
    assert "would all be black" in rejection(tiff((RAMP * scale).astype(dtype)))
    assert (gray(tiff(np.zeros((4, 4), dtype))) == 0).all()


def test_tags_that_state_no_range_are_rejected() -> None:
    assert "not below" in rejection(tiff(RAMP.astype(np.int32), 7, 7))
