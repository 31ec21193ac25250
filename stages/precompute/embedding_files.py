"""The files of a group of embeddings: three stages make them, of captions and of images."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from imagen_core.store import (
    StoredEmbedding,
    StoreDtype,
    StoreFormat,
    cast_embedding,
    embedding_shard_bytes,
    file_suffix,
    image_embed_group,
    text_group,
    write_embedding_shard,
)
from pipeline.errors import MachineError
from pipeline.stage import Task
from pipeline.storage.run_folder import STORE, RunFolder
from stages.encoders.base import EncoderIdentity
from stages.stores import previous_header


@dataclass(frozen=True, slots=True)
class EmbeddingFiles:
    """One group of embeddings, made by one encoder; `layers` and `num_scales` are those of `EmbeddingGroup`."""

    kind: Literal["text", "set_text", "image_embeds"]
    encoder: str
    dim: int
    dtype: StoreDtype
    store_format: StoreFormat
    fingerprint: dict[str, Any]
    layers: tuple[int, ...] = ()
    num_scales: int = 1

    @classmethod
    def of_text(
        cls,
        encoder: str,
        identity: EncoderIdentity,
        dtype: StoreDtype,
        store_format: StoreFormat,
        fingerprint: dict[str, Any],
        started: Mapping[str, object] | None,
    ) -> Self:
        """The group of a text encoder.

        Args:
            fingerprint: the one to record.
            started: what the run folder's group was started with, if it was: a group that a version without layers
                started goes on as it is.
        """
        layers, dim = identity.layers, identity.dim
        config = (started or {}).get("config")
        before = config if isinstance(config, Mapping) else {}
        goes_on = (before.get("dim"), before.get("dtype")) == (dim, dtype) and "num_scales" not in before
        if not layers or goes_on:
            return cls("text", encoder, dim, dtype, store_format, fingerprint)
        if identity.stacked:
            return cls("text", encoder, dim // len(layers), dtype, store_format, fingerprint, layers)
        num_scales = len(layers) if dtype == "int8" else 1
        return cls("text", encoder, dim, dtype, store_format, fingerprint, (), num_scales)

    @property
    def token_values(self) -> int:
        """Number of values of a token."""
        return self.dim * (len(self.layers) or 1)

    def with_layers(self, embedding: np.ndarray) -> np.ndarray:
        """(n_tokens, token_values) as the group has it: (n_tokens, layers, dim) where layers are stored apart. A
        view."""
        return embedding.reshape(len(embedding), len(self.layers), self.dim) if self.layers else embedding

    def shard_bytes(self, num_tokens: Sequence[int]) -> int:
        """Bytes of the file of a shard whose embeddings have these numbers of tokens."""
        num_layers = len(self.layers) or 1
        return embedding_shard_bytes(
            num_tokens, self.dim, self.dtype, num_layers=num_layers, num_scales=self.num_scales
        )

    caption_set: str | None = None
    """Of the kind `set_text`: the further set of captions that they are of."""

    @property
    def group(self) -> str:
        """Name of the group in the store."""
        if self.kind == "image_embeds":
            return image_embed_group(self.encoder)
        return text_group(self.encoder, self.caption_set)

    @property
    def blank(self) -> StoredEmbedding:
        """Replaces a dropped embedding: no tokens for a caption, one vector of zeros for an image."""
        blank = np.zeros((1 if self.kind == "image_embeds" else 0, self.token_values), np.float32)
        return cast_embedding(self.with_layers(blank), self.dtype, self.num_scales)

    def config(self, min_cosine: float | None = None) -> dict[str, object]:
        """What the bytes of the group depend on in addition to its input; `min_cosine` matters for int8 only."""
        return {
            "kind": self.kind,
            "encoder": self.encoder,
            **({} if self.caption_set is None else {"set": self.caption_set}),
            "dim": self.dim,
            "dtype": self.dtype,
            "format": self.store_format,
            "fingerprint": self.fingerprint,
            **({"layers": list(self.layers)} if self.layers else {}),
            **({"num_scales": self.num_scales} if self.num_scales > 1 else {}),
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
            layers=self.layers,
            num_scales=self.num_scales,
        )


class SharedFiles:
    """Files of a group that belong to no shard, such as the encoding of "".

    They are written once, by the first worker, and their digests are recorded next to the records of shards; whoever
    reads or lists one compares it.
    """

    def __init__(self, run: RunFolder, group: str):
        self.run = run
        self.group = group

    def keep(self, path: str, make: Callable[[], bytes]) -> bytes | None:
        """The content of a file of the store that the run has already; None if this call made it.

        Raises:
            MachineError: the file was changed since it was written.
        """
        if self.run.storage.size(f"{STORE}/{path}") is None:
            data = make()
            self.run.storage.delete(self._record(path))
            made = self.run.storage.create(f"{STORE}/{path}", data)
            kept = self.run.storage.read(f"{STORE}/{path}")
            self.run.storage.write_json(self._record(path), _entry(path, kept))
            return None if made else kept
        data = self.run.storage.read(f"{STORE}/{path}")
        entry = self._compared(path, data)
        if self._recorded(path) != entry:
            self.run.storage.write_json(self._record(path), entry)
        return data

    def entry(self, path: str) -> dict[str, object]:
        """Path, bytes and sha256 for the manifest; raises like `keep`."""
        return self._compared(path, self.run.storage.read(f"{STORE}/{path}"))

    def _compared(self, path: str, data: bytes) -> dict[str, object]:
        found = _entry(path, data)
        recorded = self._recorded(path)
        if recorded == found:
            return found
        listed = self._listed(path)  # the manifest is large, and seldom needed
        expected = recorded or listed
        if expected is not None and listed != found:
            raise MachineError(
                f"{self.run.url}/{STORE}/{path}: {found['bytes']} bytes with sha256 {found['sha256']}, but "
                f"{self._record(path)} says {expected['bytes']} bytes with {expected['sha256']}, so it was changed "
                "since; restore it from a copy, or move it away and run the same command again: it makes it again"
            )
        return found

    def _recorded(self, path: str) -> dict[str, object] | None:
        """The entry that was recorded when the file was written; None if it is missing or damaged."""
        try:
            entry = self.run.storage.read_json(self._record(path))
        except ValueError:
            return None
        return entry if isinstance(entry, dict) and entry.keys() == {"path", "bytes", "sha256"} else None

    def _listed(self, path: str) -> dict[str, object] | None:
        """The file's entry in the manifest, which knows the files that earlier versions wrote."""
        groups = previous_header(self.run).get("groups", {})
        for listed in groups.get(self.group, {}).values():
            if isinstance(listed, dict) and listed.get("path") == path:
                return {name: listed[name] for name in ("path", "bytes", "sha256")}
        return None

    def _record(self, path: str) -> str:
        return f"state/{self.group}/{path.rpartition('/')[2]}.json"


def _entry(path: str, data: bytes) -> dict[str, object]:
    return {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
