"""CLIP's image encoder (Radford et al. 2021, arXiv 2103.00020): the image embeddings that DALL-E 2 is trained on."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from stages.encoders.base import Encoded, FloatArray, FrozenModelConfig, reading, refuse_kind
from stages.encoders.batches.memory import run_batches
from stages.encoders.loading import load_weights, place
from stages.encoders.model_files import ModelFiles, hf_config
from stages.images.resample import resize_square

if TYPE_CHECKING:
    from torch import Tensor


class ClipImageModelConfig(FrozenModelConfig):
    """A CLIP image encoder."""

    kind: Literal["clip"] = "clip"
    output: Literal["projected", "pooled"] = "projected"
    """The embedding in the space shared with captions (not normalised), or the state it is projected from."""
    batch_size: int = Field(default=64, ge=1)
    """Images in one batch of the model."""

    def dim(self, files: ModelFiles) -> int:
        vision = self._vision(files)
        return vision.projection_dim if self.output == "projected" else vision.hidden_size

    def settings(self, files: ModelFiles) -> dict[str, object]:
        preprocessing = self.preprocessing(files)
        return {"image_px": preprocessing.size_px, "mean": list(preprocessing.mean), "std": list(preprocessing.std)}

    def preprocessing(self, files: ModelFiles) -> "Preprocessing":
        """How the model wants its images."""
        return Preprocessing.read(files.folder / "preprocessor_config.json", self._vision(files).image_size)

    def load(self, num_threads: int) -> "ClipImageEncoder":
        """Loads the weights.

        Raises:
            MachineError: the model cannot be found or read.
        """
        with self.located() as files:
            return ClipImageEncoder(self, files, num_threads)

    def _vision(self, files: ModelFiles) -> Any:
        if files.config.get("model_type") not in ("clip", "clip_vision_model"):
            raise refuse_kind(self.model, files, "CLIP", "give a CLIP in the format of transformers")
        config = hf_config(files)
        return getattr(config, "vision_config", config)


class ClipImageConfig(ClipImageModelConfig):
    """A CLIP image encoder, applied to images of the store."""

    from_px: int = Field(ge=1)
    """Size of the stored images it looks at; nothing is lost if it is the model's own (224 for ViT-L/14)."""

    def settings(self, files: ModelFiles) -> dict[str, object]:
        return {"from_px": self.from_px, **super().settings(files)}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The images a model was trained on: side in pixels, mean and deviation of the channels in [0, 1]."""

    size_px: int
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def read(cls, path: Path, size_px: int) -> "Preprocessing":
        if not path.is_file():
            return cls(size_px)
        facts = json.loads(path.read_text(encoding="utf-8"))
        named = {"mean": facts.get("image_mean"), "std": facts.get("image_std")}
        return cls(size_px, **{name: tuple(value) for name, value in named.items() if value is not None})

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 RGB (side, side, 3) -> float32 (3, size_px, size_px), as the model wants it."""
        if len(pixels) != self.size_px:
            pixels = resize_square(pixels, self.size_px)
        scaled = pixels.astype(np.float32) / 255
        return ((scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)).transpose(2, 0, 1)


class ClipImageEncoder:
    """A loaded image encoder on the GPU if there is one, else on the CPU."""

    def __init__(self, config: ClipImageModelConfig, files: ModelFiles, num_threads: int):
        from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

        self.config, self.dim, self._preprocessing = config, config.dim(files), config.preprocessing(files)
        self.device, self._dtype = place(config, num_threads)
        self.batch_size = config.batch_size
        model_class = CLIPVisionModelWithProjection if config.output == "projected" else CLIPVisionModel
        with reading(config):
            self._model = load_weights(model_class, files, self._dtype, self.device)

    def encode(self, images: Iterable[np.ndarray]) -> Encoded:
        """uint8 RGB (side, side, 3) each -> float32 (1, dim) each; does not depend on the batches beyond rounding.

        A batch that does not fit into memory halves `batch_size`, for as long as the encoder lives.

        Raises:
            MemoryError: not even one image fits.
        """
        rows: list[FloatArray] = []
        halvings = 0
        prepared = map(self._preprocessing.prepare, images)
        while part := list(islice(prepared, self.batch_size)):
            batches = run_batches(
                range(len(part)),
                self.batch_size,
                lambda rest, size: [list(rest[i : i + size]) for i in range(0, len(rest), size)],
                lambda batch: self._forward(np.stack([part[i] for i in batch])),
            )
            self.batch_size, halvings = batches.limit, halvings + batches.halvings
            rows += [row[None] for _, values in batches.results for row in values.numpy()]
        return Encoded(rows, oom_halvings=halvings)

    def _forward(self, pixels: np.ndarray) -> "Tensor":
        """float32 (batch, 3, size_px, size_px) -> float32 (batch, dim) on the CPU."""
        import torch

        with torch.inference_mode():
            result = self._model(pixel_values=torch.from_numpy(pixels).to(self.device, self._dtype))
            values = result.image_embeds if self.config.output == "projected" else result.pooler_output
            return values.float().cpu()
