"""Cleans captions: defined results for whatever the internet writes."""

import unicodedata
from collections.abc import Sequence

NORMALISATION = "control characters to spaces, strip"
"""Part of the encoder fingerprint; change it together with `clean_caption`."""


MAX_CHARACTERS = 100_000
"""Of all captions of a sample together. Tokenizers take seconds and hundreds of MB per million."""


def clean_caption(caption: str) -> str:
    """Replaces control characters (NUL, newlines, tabs ...) by spaces and strips the ends.

    Nothing else is touched: case, emoji, right-to-left text and combining characters stay as they are.
    """
    if caption.isprintable():
        return caption.strip()
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in caption).strip()


def is_valid_text(caption: str) -> bool:
    """False if the bytes were not UTF-8 (decoded with surrogate escapes)."""
    return not any("\ud800" <= c <= "\udfff" for c in caption)


def clean_captions(captions: Sequence[str] | None) -> tuple[tuple[str, ...], str | None]:
    """Cleans a sample's captions: empty and repeated ones are left out.

    Args:
        captions: None: the source has no captions; then the sample has one, the empty caption.
    Returns:
        The captions, and the drop reason if none is left (`empty_caption`), one is not text (`invalid_caption`) or
        they have more than MAX_CHARACTERS (`caption_too_long`).
    """
    if captions is None:
        return ("",), None
    if sum(len(caption.strip()) for caption in captions) > MAX_CHARACTERS:
        return (), "caption_too_long"
    if not all(is_valid_text(caption) for caption in captions):
        return (), "invalid_caption"
    cleaned = tuple(dict.fromkeys(c for c in map(clean_caption, captions) if c))
    return (cleaned, None) if cleaned else ((), "empty_caption")
