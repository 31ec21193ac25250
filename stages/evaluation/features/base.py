"""What a feature model is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Extracted:
    """Arrays with one row for each image or caption, by name."""

    arrays: Mapping[str, np.ndarray]
    """`features` float32 (n, d), and `logits` (n, classes) if the model is a classifier."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Counts to report with the metrics, such as truncated captions."""


class Named(Protocol):
    """The settings of a frozen model."""

    @property
    def label(self) -> str:
        """Names the model in tables: distances of different models cannot be compared."""
        ...

    def fingerprint(self) -> Mapping[str, object]:
        """Everything that decides the features; found without loading the model.

        Raises:
            MachineError: the model cannot be found, or has another kind.
        """
        ...


class FeatureModel(Named, Protocol):
    """The settings of a model that extracts features of images."""

    def extract(self, images: Iterable[np.ndarray]) -> Extracted:
        """Loads the model and extracts the features of uint8 RGB (h, w, 3) images, of the centre square of each.

        Raises:
            MachineError: the model cannot be read.
        """
        ...
