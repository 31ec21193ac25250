"""What a feature model is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import ClassVar, Protocol

import numpy as np

from pipeline.config import Config

_LIBRARIES = ("torch", "transformers", "pillow")


@dataclass(frozen=True, slots=True)
class Extracted:
    """Arrays with one row for each image or caption, by name."""

    arrays: Mapping[str, np.ndarray]
    """`features` float32 (n, d), and `logits` (n, classes) if the model is a classifier."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Counts to report with the metrics, such as truncated captions."""


class Named(Protocol):
    """A frozen model, or the half of one that is used."""

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


class FrozenConfig(Config):
    """The settings of what features are made of. A field is part of the fingerprint, unless `inert` names it."""

    inert: ClassVar[Mapping[str, str]] = {}
    """Fields that are not in the fingerprint, and why the features do not depend on their values."""

    def acting(self, *others: str) -> dict[str, object]:
        """The values of all fields that act, without `others`, which act on something else."""
        return self.model_dump(mode="json", exclude={*self.inert, *others})


ROUNDING = "changes rounding alone"
BY_CONTENT = "where the files are; their content is in the fingerprint"


def environment() -> dict[str, str]:
    """What the numbers of a model depend on besides its fingerprint: versions, and the kind of device."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"device": device, **{library: version(library) for library in _LIBRARIES}}
