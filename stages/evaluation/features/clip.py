"""CLIP as a feature model: features for distances, and both halves of the CLIP score."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from stages.captions import clean_caption
from stages.encoders.clip import ClipTextConfig
from stages.encoders.clip_image import ClipImageModelConfig
from stages.encoders.encoder import load_encoder
from stages.encoders.loading import threads_of_process
from stages.evaluation.features.base import BY_CONTENT, ROUNDING, Extracted, FrozenConfig
from stages.images.resample import center_square


class ClipFeatures(FrozenConfig):
    """A CLIP in the format of transformers."""

    inert: ClassVar[Mapping[str, str]] = {"model": BY_CONTENT, "revision": BY_CONTENT, "batch_size": ROUNDING}

    kind: Literal["clip"] = "clip"
    model: str
    """Hub id (`openai/clip-vit-large-patch14`) or local folder."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    output: Literal["projected", "pooled"] = "projected"
    """The embedding in the space shared with captions, which the CLIP score needs; or the state before it."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations."""
    max_tokens: int = Field(default=77, ge=2)
    """Longest caption in tokens; longer ones are truncated and counted."""
    batch_size: int = Field(default=64, ge=1)
    """Images in one batch of the model."""

    @property
    def label(self) -> str:
        return f"CLIP {PurePath(self.model).name}"

    @cached_property
    def identity(self) -> Mapping[str, object]:
        """Of the image half; the weights are hashed once."""
        return {**self._images().identify().fingerprint, **self.acting("max_tokens")}

    def fingerprint(self) -> Mapping[str, object]:
        return self.identity

    @cached_property
    def captions(self) -> "ClipCaptions":
        """The half that reads captions, for the CLIP score.

        Raises:
            ConfigError: captions of max_tokens are longer than the model takes.
            MachineError: the model has no tokenizer.
        """
        config = self._captions()
        return ClipCaptions(self.label, config, {**config.identify().fingerprint, **self.acting("output")})

    def extract(self, images: Iterable[np.ndarray]) -> Extracted:
        encoder = load_encoder(self._images(), threads_of_process())
        rows = encoder.encode(center_square(pixels) for pixels in images).embeddings
        return Extracted({"features": np.concatenate(rows)})

    def _captions(self) -> ClipTextConfig:
        return ClipTextConfig(
            name="clip",
            model=self.model,
            revision=self.revision,
            output="projected",
            compute_dtype=self.compute_dtype,
            max_tokens=self.max_tokens,
        )

    def _images(self) -> ClipImageModelConfig:
        return ClipImageModelConfig(
            name="clip",
            model=self.model,
            revision=self.revision,
            output=self.output,
            compute_dtype=self.compute_dtype,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True, slots=True)
class ClipCaptions:
    """The half of a CLIP that reads captions."""

    label: str
    config: ClipTextConfig
    identity: Mapping[str, object]

    def fingerprint(self) -> Mapping[str, object]:
        return self.identity

    def extract(self, captions: Sequence[str]) -> Extracted:
        """`features` float32 (n, d) of the captions, and how many were truncated.

        Raises:
            MachineError: the model cannot be read.
        """
        encoder = load_encoder(self.config, threads_of_process())
        encoded = encoder.encode([clean_caption(caption) for caption in captions])
        return Extracted(
            {"features": np.concatenate(encoded.embeddings)}, {"captions_truncated": encoded.num_truncated}
        )
