"""The files of a group of embeddings: three stages make them, of captions and of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from imagen_core.store import (
    StoredEmbedding,
    StoreDtype,
    StoreFormat,
    cast_embedding,
    file_suffix,
    image_embed_group,
    text_group,
    write_embedding_shard,
)
from pipeline.stage import Task


@dataclass(frozen=True, slots=True)
class EmbeddingFiles:
    """One group of embeddings, made by one encoder."""

    kind: Literal["text", "image_embeds"]
    encoder: str
    dim: int
    dtype: StoreDtype
    store_format: StoreFormat
    fingerprint: dict[str, Any]

    @property
    def group(self) -> str:
        """Name of the group in the store."""
        return (text_group if self.kind == "text" else image_embed_group)(self.encoder)

    @property
    def blank(self) -> StoredEmbedding:
        """Replaces a dropped embedding: no tokens for a caption, one vector of zeros for an image."""
        return cast_embedding(np.zeros((0 if self.kind == "text" else 1, self.dim), np.float32), self.dtype)

    def config(self, min_cosine: float | None = None) -> dict[str, object]:
        """What the bytes of the group depend on in addition to its input; `min_cosine` matters for int8 only."""
        return {
            "kind": self.kind,
            "encoder": self.encoder,
            "dim": self.dim,
            "dtype": self.dtype,
            "format": self.store_format,
            "fingerprint": self.fingerprint,
            **({"min_cosine": min_cosine} if self.dtype == "int8" else {}),
        }

    def write(self, task: Task, embeddings: Sequence[StoredEmbedding], names: Sequence[str]) -> None:
        """Writes the file of a shard.

        Args:
            names: the captions, or the keys of the samples that the images belong to; one per embedding.
        """
        write_embedding_shard(
            task.output(self.group, file_suffix(self.store_format)),
            embeddings,
            [len(embedding.values) for embedding in embeddings],
            self.dim,
            self.dtype,
            self.store_format,
            captions=names,
            fingerprint=self.fingerprint,
        )
