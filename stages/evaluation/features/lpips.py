"""LPIPS between images and the ones they should look like, from a file of weights."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from pipeline.errors import ConfigError
from stages.evaluation.features.base import BY_CONTENT, ROUNDING, Extracted, FrozenConfig
from stages.evaluation.features.weights import load_weights, weights_digest
from stages.images.resample import center_square

if TYPE_CHECKING:
    from imagen_core.evaluation.lpips import Lpips


class LpipsDistance(FrozenConfig):
    """The perceptual distance."""

    inert: ClassVar[Mapping[str, str]] = {"path": BY_CONTENT, "batch_size": ROUNDING}

    path: str
    """Weights in .safetensors: the features of torchvision's AlexNet or VGG-16 and LPIPS's own;
    docs/how-to/evaluation.md converts them."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs in one batch of the network."""

    @property
    def label(self) -> str:
        return f"LPIPS, {Path(self.path).name}"

    @cached_property
    def sha256(self) -> str:
        """Of the weights."""
        return weights_digest("lpips.path", self.path)

    def fingerprint(self) -> Mapping[str, object]:
        return {"kind": "lpips", **self.acting(), "sha256": self.sha256}

    def load(self) -> "Lpips":
        """The network.

        Raises:
            MachineError: the weights cannot be read, or do not fit.
        """
        from imagen_core.evaluation.lpips import Lpips

        return load_weights("lpips.path", self.path, Lpips.of)

    def distances(self, images: Iterable[np.ndarray], originals: Iterable[np.ndarray]) -> Extracted:
        """`features` float32 (n, 1): the distance of each pair of centre squares.

        Raises:
            MachineError: the weights cannot be read.
            ConfigError: a pair with different sizes, or images that are too small.
        """
        import torch

        from imagen_core.images import from_pixels

        model = self.load()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device).eval().requires_grad_(False)
        found = []
        with torch.inference_mode():
            for batch in self._batches(images, originals):
                a, b = (from_pixels(np.stack(side)).to(device) for side in zip(*batch, strict=True))
                try:
                    found.append(model(a, b).float().cpu().numpy()[:, None])
                except ValueError as error:
                    raise ConfigError(f"lpips: {error}") from error
        return Extracted({"features": np.concatenate(found)})

    def _batches(
        self, images: Iterable[np.ndarray], originals: Iterable[np.ndarray]
    ) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        held: list[tuple[np.ndarray, np.ndarray]] = []
        for number, pair in enumerate(zip(images, originals, strict=True)):
            a, b = map(center_square, pair)
            if a.shape != b.shape:
                raise ConfigError(
                    f"lpips: image {number} is {len(a)} px and the one it is compared with {len(b)} px; give "
                    "equal sizes"
                )
            if held and (len(held) == self.batch_size or a.shape != held[0][0].shape):
                yield held
                held = []
            held.append((a, b))
        if held:
            yield held
