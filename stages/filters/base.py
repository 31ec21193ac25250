"""What a filter is: a rule that says of a decoded row whether it is stored."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from imagen_core.store import ColumnType
from pipeline.config import Config


@dataclass(frozen=True, slots=True)
class FilterRow:
    """A row that was fetched and decoded, as filters see it."""

    key: str
    url: str | None
    captions: tuple[str, ...]
    """Cleaned; at least one."""
    data: bytes
    """The image file as it was fetched; empty if the source has no images."""
    sizes_px: tuple[int, ...]
    """Sides of the images that will be made, in pixels; of buckets those of their square."""
    pixels: np.ndarray | None = None
    """The decoded image, uint8 (height, width, 3), upright sRGB; None where images.sizes_px is [], so that none is
    decoded."""
    annotations: Mapping[str, Any] = field(default_factory=dict)
    """`transcription` (text in the image), `safebox` (left, top, right, bottom in pixels) and `label` (class number),
    as far as the source has them; `columns`: the values of source.keep_columns by name."""
    shapes: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Height and width of the image that will be made, by each of `sizes_px`: the square, or the shape of the image's
    aspect-ratio bucket. Empty: squares."""

    @property
    def height(self) -> int:
        """In pixels; 0 if no image was decoded."""
        return 0 if self.pixels is None else self.pixels.shape[0]

    @property
    def width(self) -> int:
        """In pixels; 0 if no image was decoded."""
        return 0 if self.pixels is None else self.pixels.shape[1]


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a row is dropped."""

    reason: str
    """A short enumerated word such as `too_small`; drops are counted by it, so it must not contain values."""
    detail: str = ""
    """The values, for people."""


class Filter(Config):
    """One rule. Its configuration is part of the fingerprint of group `samples`."""

    kind: str

    def check(self, columns: Mapping[str, ColumnType]) -> None:
        """Called before the run with the columns that are kept of the source, and their types.

        Raises:
            ConfigError: the filter reads a column that is not among them, or is of another type.
        """

    @abstractmethod
    def reject(self, row: FilterRow) -> Rejection | None:
        """Why the row is dropped; None keeps it. Must depend on the configuration and the row alone."""
