"""The network of FID and of the Inception score, from a file of weights."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from stages.evaluation.features.base import BY_CONTENT, ROUNDING, Extracted, FrozenConfig
from stages.evaluation.features.weights import load_weights, weights_digest
from stages.images.resample import center_square

if TYPE_CHECKING:
    from imagen_core.evaluation.inception import FidInception


class InceptionFeatures(FrozenConfig):
    """Inception v3 as FID has it; with the weights of 2015 the distance is the published FID."""

    inert: ClassVar[Mapping[str, str]] = {"path": BY_CONTENT, "batch_size": ROUNDING}

    kind: Literal["inception"] = "inception"
    path: str
    """Weights in .safetensors, by torchvision's names; docs/how-to/evaluation.md converts those of pytorch-fid."""
    batch_size: int = Field(default=64, ge=1)
    """Images in one batch of the network; all are of one size."""

    @property
    def label(self) -> str:
        return f"Inception v3, {Path(self.path).name}"

    @cached_property
    def sha256(self) -> str:
        """Of the weights."""
        return weights_digest("features.path", self.path)

    def fingerprint(self) -> Mapping[str, object]:
        return {**self.acting(), "sha256": self.sha256}

    def load(self) -> "FidInception":
        """The network.

        Raises:
            MachineError: the weights cannot be read, or do not fit.
        """
        from imagen_core.evaluation.inception import FidInception

        return load_weights("features.path", self.path, FidInception.of)

    def extract(self, images: Iterable[np.ndarray]) -> Extracted:
        import torch

        from imagen_core.images import from_pixels

        model = self.load()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device).eval().requires_grad_(False)
        features: list[np.ndarray] = []
        logits: list[np.ndarray] = []
        with torch.inference_mode():
            for batch in self._batches(images):
                for found, rows in zip(model(from_pixels(batch).to(device)), (features, logits), strict=True):
                    rows.append(found.cpu().numpy())
        return Extracted({"features": np.concatenate(features), "logits": np.concatenate(logits)})

    def _batches(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Centre squares of one size; an image of another size starts a new batch."""
        squares = map(center_square, images)
        held: list[np.ndarray] = []
        for square in squares:
            if held and (len(held) == self.batch_size or square.shape != held[0].shape):
                yield np.stack(held)
                held = []
            held.append(square)
        if held:
            yield np.stack(held)
