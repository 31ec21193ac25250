"""Images for tests, good and bad, as bytes."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain_png(colour: tuple[int, int, int] = RED, size_px: int = 32) -> bytes:
    """A square of one colour."""
    return _saved(Image.new("RGB", (size_px, size_px), colour), "PNG")


def noise_jpeg(size_px: int = 64) -> bytes:
    """Some kilobytes that truncation really damages."""
    pixels = np.random.default_rng(0).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    return _saved(Image.fromarray(pixels), "JPEG", quality=95)


def animation(kind: str, size_px: int = 32) -> bytes:
    """Red, then blue; `kind` is GIF or WEBP."""
    frames = [Image.new("RGB", (size_px, size_px), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    return _saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)


def bomb_png(side_px: int = 30_000, rows: int = 300) -> bytes:
    """A small file that claims side x side pixels; `rows` of them are really there."""
    deflate = zlib.compressobj(9)
    row = bytes(1 + side_px * 3)
    data = b"".join(deflate.compress(row) for _ in range(rows)) + deflate.flush()
    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
