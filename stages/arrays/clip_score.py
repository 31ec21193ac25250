"""`kind: clip_score`: how well captions fit their images, from the embeddings of a CLIP that the store has."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from imagen_core.store import ArraySpec, EmbeddingGroup, Group, Sample, image_embed_group, text_group
from stages.arrays.base import ArrayStageConfig, MakeArrays, StageConfig

_PROJECTED = "projected"


class ClipScoreConfig(StageConfig):
    """An array `NAME.SET` for each set of captions: the cosine of image and caption in the space of a CLIP, -1 to 1.

    float32 (n,), one for each caption of the set that a sample has and that could be encoded, in their order. It reads
    embeddings that are in the store, so it needs a text encoder and an image encoder of one CLIP with the output
    `projected`; a caption that is longer than CLIP reads counts as far as it reads it.
    """

    kind: Literal["clip_score"] = "clip_score"
    encoder: str = "clip"
    """Name of the text encoder."""
    image_encoder: str = "clip"
    """Name of the image encoder."""
    captions: tuple[str, ...] = ()
    """The sets of captions; none: all that the store will have."""
    name: str = Field(default="clip_score", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """How the arrays are named."""

    def stages(self, caption_sets: Sequence[str]) -> Sequence[ArrayStageConfig]:
        missing = [name for name in self.captions if name not in caption_sets]
        if missing:
            raise ValueError(f"captions: there is no set {missing[0]!r}; there are {', '.join(caption_sets)}")
        return [
            _ScoresOfSet(
                name=f"{self.name}.{caption_set}",
                caption_set=caption_set,
                is_first=caption_set == caption_sets[0],
                encoder=self.encoder,
                image_encoder=self.image_encoder,
            )
            for caption_set in self.captions or caption_sets
        ]


class _ScoresOfSet(ArrayStageConfig):
    """The scores of one set, so that those of a set that is added later are all that is made."""

    kind: Literal["clip_score"] = "clip_score"
    machine_fields: ClassVar[frozenset[str]] = frozenset(("is_first", "name"))
    name: str
    caption_set: str
    is_first: bool
    """Whether it is the set of `samples`."""
    encoder: str
    image_encoder: str

    def arrays(self) -> Mapping[str, ArraySpec]:
        return {self.name: ArraySpec("float32", (None,))}

    def reads(self) -> tuple[str, ...]:
        return text_group(self.encoder, self._further), image_embed_group(self.image_encoder)

    def check(self, groups: Mapping[str, Group]) -> None:
        text, image = (groups[name] for name in self.reads())
        assert isinstance(text, EmbeddingGroup)
        assert isinstance(image, EmbeddingGroup)
        for group in (text, image):
            output = group.fingerprint.get("output", _PROJECTED)
            if output != _PROJECTED:
                raise ValueError(f"{group.name} has the output {output!r}, not in the space of both; set {_PROJECTED}")
        if text.dim != image.dim:
            raise ValueError(
                f"{text.name} has {text.dim} dimensions and {image.name} {image.dim}: they are not of one CLIP"
            )
        found = [[group.fingerprint.get(part) for part in ("model", "weights_sha256")] for group in (text, image)]
        if all(None not in pair for pair in found) and not any(a == b for a, b in zip(*found, strict=True)):
            raise ValueError(f"{text.name} is by {found[0][0]} and {image.name} by {found[1][0]}; give one CLIP")

    def build(self) -> MakeArrays:
        from imagen_core.evaluation.clip_score import similarities

        def scores(sample: Sample) -> np.ndarray:
            image = sample.image_embeds[self.image_encoder]
            texts = sample.text if self.is_first else sample.set_texts[self.caption_set]
            rows = [text for text in texts[self.encoder] if text.any()]
            if any(len(text) != 1 for text in rows):
                raise ValueError(f"{sample.key}: {self.encoder} has a vector for each token, not one for each caption")
            if not rows or not image.any():
                return np.zeros(0, np.float32)
            texts = np.concatenate(rows)
            return similarities(np.broadcast_to(image, texts.shape), texts).astype(np.float32)

        def make(samples: Iterable[Sample]) -> Iterator[Mapping[str, np.ndarray]]:
            for sample in samples:
                yield {self.name: scores(sample)}

        return make

    @property
    def _further(self) -> str | None:
        return None if self.is_first else self.caption_set
