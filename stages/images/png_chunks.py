"""PNG files whose text or profile is longer than Pillow's process-wide limits, which reject the image as well."""

import struct
import zlib
from collections.abc import Iterator

_SIGNATURE_BYTES = 8
_MAX_PROFILE_BYTES = 16 * 2**20
_MAX_TEXT_BYTES = 2**20
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_WITH_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif")
"""Keywords of the texts in which Pillow finds the orientation."""


def without_long_chunks(data: bytes) -> tuple[bytes, bytes | None]:
    """The PNG without its texts, except short ones that may hold the orientation, and without its colour profile.

    Returns:
        The file, and the inflated profile; None if there is none, or one of more than 16 MiB or that is broken.
    """
    kept, profile = [data[:_SIGNATURE_BYTES]], None
    for kind, body, chunk in _chunks(data):
        if kind == b"iCCP":
            profile = _inflate(body.partition(b"\0")[2][1:], _MAX_PROFILE_BYTES)
        elif kind not in _TEXT or _is_short_orientation(kind, body):
            kept.append(chunk)
    return b"".join(kept), profile


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Kind, content and complete bytes of each chunk; what follows a truncated one belongs to it."""
    start = _SIGNATURE_BYTES
    while start < len(data):
        length = struct.unpack(">I", data[start : start + 4].rjust(4, b"\xff"))[0]
        end = start + 12 + length
        yield data[start + 4 : start + 8], data[start + 8 : end - 4], data[start:end]
        start = end


def _is_short_orientation(kind: bytes, body: bytes) -> bool:
    keyword, _, rest = body.partition(b"\0")
    if keyword not in _WITH_ORIENTATION or len(body) > _MAX_TEXT_BYTES:
        return False
    if kind == b"tEXt":
        return True
    if kind == b"zTXt":
        return _inflate(rest[1:], _MAX_TEXT_BYTES) is not None
    is_compressed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    return not is_compressed or _inflate(text, _MAX_TEXT_BYTES) is not None


def _inflate(data: bytes, max_bytes: int) -> bytes | None:
    """The inflated bytes; None if they are broken or more than `max_bytes`."""
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, max_bytes)
    except zlib.error:
        return None
    return None if inflater.unconsumed_tail else plain
