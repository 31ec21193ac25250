"""The network of FID and of the Inception score, from a file of weights."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import ConfigError, MachineError
from pipeline.files import file_digest
from stages.features.base import Extracted
from stages.images.resample import center_square


class InceptionFeatures(Config):
    """Inception v3 as FID has it; with the weights of 2015 the distance is the published FID."""

    kind: Literal["inception"] = "inception"
    path: str
    """Weights in .safetensors, by torchvision's names; docs/evaluation.md converts those of pytorch-fid."""
    batch_size: int = Field(default=64, ge=1)
    """Pictures in one batch of the network; all are of one size."""

    @property
    def label(self) -> str:
        return f"Inception v3, {Path(self.path).name}"

    @cached_property
    def sha256(self) -> str:
        """Of the weights."""
        if Path(self.path).suffix != ".safetensors":
            raise ConfigError(
                f"features.path: {self.path}: give weights in .safetensors (docs/evaluation.md converts .pth); "
                "TorchScript archives are not read, as loading one runs code from the file"
            )
        try:
            return file_digest(Path(self.path))
        except OSError as error:
            raise MachineError(
                f"features.path: {self.path} cannot be read ({error.strerror}); check the path"
            ) from error

    def fingerprint(self) -> Mapping[str, object]:
        return {"kind": self.kind, "sha256": self.sha256}

    def extract(self, pictures: Iterable[np.ndarray]) -> Extracted:
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from imagen_core.evaluation.inception import FidInception
        from imagen_core.pictures import from_pixels

        model = FidInception()
        try:
            model.load(load_file(self.path))
        except (SafetensorError, ValueError) as error:
            raise MachineError(f"features.path: {self.path}: {error}; give weights as pytorch-fid has them") from error
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device).eval().requires_grad_(False)
        features: list[np.ndarray] = []
        logits: list[np.ndarray] = []
        with torch.inference_mode():
            for batch in self._batches(pictures):
                for found, rows in zip(model(from_pixels(batch).to(device)), (features, logits), strict=True):
                    rows.append(found.cpu().numpy())
        return Extracted({"features": np.concatenate(features), "logits": np.concatenate(logits)})

    def _batches(self, pictures: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Centre squares of one size; pictures of another size begin a new batch."""
        squares = map(center_square, pictures)
        held: list[np.ndarray] = []
        for square in squares:
            if held and (len(held) == self.batch_size or square.shape != held[0].shape):
                yield np.stack(held)
                held = []
            held.append(square)
        if held:
            yield np.stack(held)
