"""Digests that bind a row of one file to the sample, caption and encoder it belongs to.

They have 8 bytes per row (xxHash XXH3-64, 3 to 20 GB/s): they detect mistakes, such as swapped rows or files of
another run, but not an attacker. The sha256 in the manifest protects the files.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from imagen_core.store.files.ragged import StoredEmbedding

DIGEST_DTYPE = np.dtype("<u8")


def caption_digest(fingerprint: str, caption: str, stored: StoredEmbedding) -> int:
    """The uint64 digest of a row of embeddings: the encoder's `fingerprint_digest`, the caption (or the sample's key)
    and the embedding as stored: the values of each layer, then the scales of each."""
    parts = stored.parts()
    scales = [part.scales for part in parts if part.scales is not None]
    return _digest(fingerprint.encode(), caption.encode(), *(part.values for part in parts), *scales)


def image_digest(key: str, sha256: str, stored: np.ndarray) -> int:
    """The uint64 digest of a row of images: the sample's key, its original's sha256, and the image as stored."""
    return _digest(key.encode(), sha256.encode(), stored)


def array_digest(fingerprint: str, key: str, stored: np.ndarray) -> int:
    """The uint64 digest of a row of arrays: the maker's `fingerprint_digest`, the sample's key, and the array as
    stored, with the length of each axis."""
    return _digest(fingerprint.encode(), key.encode(), np.array(stored.shape, "<i4"), stored)


def captions_digest(key: str, captions: Sequence[str]) -> int:
    """The uint64 digest of a row of a further set of captions: the sample's key, and its captions of the set."""
    return _digest(key.encode(), *(caption.encode() for caption in captions))


def fingerprint_digest(fingerprint: Mapping[str, Any]) -> str:
    """SHA-256 of an encoder's fingerprint as canonical JSON, 64 hex digits."""
    text = json.dumps(fingerprint, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digest(*parts: bytes | np.ndarray) -> int:
    """Includes the length of each part, so that different lists of parts never have the same bytes."""
    digest = xxhash.xxh3_64()
    for part in parts:
        data = np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else memoryview(part)
        digest.update(data.nbytes.to_bytes(8, "little"))
        digest.update(data)
    return digest.intdigest()
