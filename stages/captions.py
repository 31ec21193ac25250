"""Cleans captions: defined results for whatever the internet writes."""

import re
import unicodedata
from collections.abc import Sequence

NORMALISATION = "control characters to spaces, strip"
"""Part of every text encoder's fingerprint: `clean_caption`, then `on_one_line` unless the encoder follows a recipe,
which its other settings say. Change it together with them."""

_BREAKS = "\t\n\r"
_SURROGATE = re.compile("[\ud800-\udfff]")
_TO_SPACES = str.maketrans(dict.fromkeys(_BREAKS, " "))

MAX_CHARACTERS = 100_000
"""Of all captions of a sample together. Tokenizers take seconds and hundreds of MB per million."""


def clean_caption(caption: str) -> str:
    """A caption as it is stored: control characters (NUL, escape ...) are spaces, but for tabs and line ends; the ends
    are stripped.

    Nothing else is touched: case, emoji, right-to-left text and combining characters stay as they are.
    """
    if caption.isprintable():
        return caption.strip()
    return "".join(" " if unicodedata.category(c) == "Cc" and c not in _BREAKS else c for c in caption).strip()


def on_one_line(caption: str) -> str:
    """Tabs and line ends as spaces, one for each: how encoders read captions that follow no recipe."""
    return caption.translate(_TO_SPACES)


def is_valid_text(caption: str) -> bool:
    """False if the bytes were not UTF-8 (decoded with surrogate escapes)."""
    return caption.isascii() or _SURROGATE.search(caption) is None


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
