"""The orientation that img2dataset keeps only as text.

It decodes images without turning them (OpenCV's IMREAD_UNCHANGED), writes them again without EXIF, and puts what the
EXIF was as JSON into the key or column `exif`, in the words of the package exifread.
"""

import json

_KEY = "Image Orientation"
_ORIENTATIONS = {
    "Horizontal (normal)": 1,
    "Mirrored horizontal": 2,
    "Rotated 180": 3,
    "Mirrored vertical": 4,
    "Mirrored horizontal then rotated 90 CCW": 5,
    "Rotated 90 CW": 6,
    "Mirrored horizontal then rotated 90 CW": 7,
    "Rotated 90 CCW": 8,
}


def exif_with(orientation: int) -> str:
    """The text from which `orientation_in` reads this orientation (1 to 8)."""
    words = next(words for words, number in _ORIENTATIONS.items() if number == orientation)
    return json.dumps({_KEY: words})


def exif_settings(column: str | None) -> dict[str, object]:
    """The part of a source's fingerprint; nothing for the usual column."""
    return {} if column == "exif" else {"exif_column": column}


def orientation_in(exif: object) -> int | None:
    """The EXIF orientation (1 to 8) in the text that img2dataset wrote; None if it has none that is valid."""
    if isinstance(exif, str):
        try:
            exif = json.loads(exif)
        except (ValueError, RecursionError):
            return None
    value = exif.get(_KEY) if isinstance(exif, dict) else None
    return _ORIENTATIONS.get(value) if isinstance(value, str) else None
