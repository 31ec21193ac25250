"""Images for a browser: of samples as they are stored, of embeddings as heat maps, of errors as text."""

import io
import textwrap
from html import escape

import numpy as np
from PIL import Image

from imagen_core.store import Store

_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_MOST_COLUMNS, _MOST_ROWS = 512, 1024
_LINE, _MOST_LINES = 26, 9
_COLD, _ZERO, _WARM = np.array([(33, 102, 172), (247, 247, 247), (178, 24, 43)], np.float32)


def stored_image(store: Store, position: int, row: int, size_px: int) -> tuple[bytes, str]:
    """Bytes and media type of a sample's image: those of the file, or the raw pixels as PNG.

    Raises:
        StoreError: it cannot be read.
    """
    group = store.image_group(size_px)
    stored = store.shard(position).images[size_px].stored(row)
    if group.codec == "raw":
        return png(np.asarray(stored)), "image/png"
    return stored.tobytes(), _TYPES[group.codec]


def png(pixels: np.ndarray) -> bytes:
    """uint8 (h, w, 3) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def heat_map(embedding: np.ndarray) -> np.ndarray:
    """An embedding, float (n_tokens, dim), as uint8 (rows, columns, 3): a row per token, blue below 0 and red above.

    Of more than 512 values per token each column is the one farthest from 0 of its neighbours. The darkest colours are
    of the 99th percentile of all magnitudes and beyond; what is not finite is black.
    """
    values = embedding[:_MOST_ROWS].astype(np.float32)
    width = -(-values.shape[1] // _MOST_COLUMNS)
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % width)))
    parts = padded.reshape(len(values), padded.shape[1] // width, width)
    finite = np.asarray(np.isfinite(parts).all(axis=2))
    farthest = np.take_along_axis(parts, np.abs(parts).argmax(axis=2)[..., None], axis=2)[..., 0]
    scale = np.percentile(np.abs(farthest[finite]), 99) if finite.any() else 1.0
    level = np.clip(np.where(finite, farthest, 0) / (scale or 1.0), -1, 1)[..., None]
    colours = np.where(level < 0, _ZERO + level * (_ZERO - _COLD), _ZERO + level * (_WARM - _ZERO))
    return np.where(finite[..., None], colours.round(), 0).astype(np.uint8)


def error_image(line: str) -> bytes:
    """An SVG file that shows an error in the place of an image."""
    lines = textwrap.wrap(line, _LINE, max_lines=_MOST_LINES, placeholder=" ...") or ["error"]
    texts = "".join(f'<text x="4" y="{14 + 15 * i}">{escape(text)}</text>' for i, text in enumerate(lines))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="150" height="150" viewBox="0 0 150 150" fill="#a3161a" '
        f'font-family="monospace" font-size="9"><rect width="150" height="150" fill="#fbeaea"/>{texts}</svg>'
    ).encode()
