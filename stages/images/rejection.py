"""Why an image is not usable."""

from enum import StrEnum


class RejectReason(StrEnum):
    """Why an image is not usable."""

    EMPTY_FILE = "empty_file"
    NOT_AN_IMAGE = "not_an_image"
    """No allowed format: a web page, text, a format outside the list."""
    DECODE_ERROR = "decode_error"
    TRUNCATED = "truncated"
    TOO_MANY_PIXELS = "too_many_pixels"
    OUT_OF_MEMORY = "out_of_memory"
    """The machine had no memory for it; another try may succeed."""
    UNSUPPORTED_RANGE = "unsupported_range"
    """The file does not say which of its values are black and white."""


class ImageRejected(Exception):
    """An image that cannot be used; `reason` is for counting, `detail` for a person."""

    def __init__(self, reason: RejectReason, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
