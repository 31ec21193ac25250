"""Takes embeddings that came with the data into the store."""

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from imagen_core.store import (
    SampleRow,
    StoreDtype,
    StoreFormat,
    image_embed_group,
    is_finite_as,
    null_path,
    read_samples,
    text_group,
    text_shard_bytes,
    token_errors,
    write_null,
    write_text_shard,
)
from pipeline.errors import ConfigError
from pipeline.stage import Drop, Group, GroupResult, Stage, Task, rows_by_reason
from pipeline.storage.run_folder import STORE, RunFolder
from stages.encoders.given import PrecomputedEmbeddingsConfig, as_tokens, without_padding
from stages.precompute.fetch import SAMPLES
from stages.precompute.quantisation import quantisation_facts, storable
from stages.sources.base import PrecomputedEmbedding, Source

_SAME = 0.05
"""Relative error of a token between embeddings of one caption that were computed in different batches."""


class PrecomputedEmbeddingsStage(Stage):
    """`samples`, and the source's arrays -> `text-NAME` or `image-embed-NAME`. Row by row, nothing is computed.

    A text group has one embedding a distinct caption, so samples with equal captions must have equal embeddings, as
    they have from any frozen encoder; one that has another is dropped (`other_embedding`).
    """

    inputs = (SAMPLES,)

    def __init__(
        self,
        encoder: PrecomputedEmbeddingsConfig,
        source: Source,
        of: Literal["captions", "images"],
        store_format: StoreFormat,
        dtype: StoreDtype,
        min_cosine: float = 0.99,
    ):
        self.encoder = encoder
        self.source = source
        self.of = of
        self.store_format: StoreFormat = store_format
        self.dtype: StoreDtype = "float16" if dtype == "int8" and of == "images" else dtype
        self.min_cosine = min_cosine
        self.fingerprint = encoder.fingerprint(source.describe_array(encoder.array))
        self.group = (text_group if of == "captions" else image_embed_group)(encoder.name)
        self.name = f"take-{self.group}"
        config = {
            "kind": "text" if of == "captions" else "image_embeds",
            "encoder": encoder.name,
            "dim": encoder.dim,
            "dtype": self.dtype,
            "format": store_format,
            "fingerprint": self.fingerprint,
            **({"min_cosine": min_cosine} if self.dtype == "int8" else {}),
        }
        shared: tuple[str, ...] = ()
        if of == "captions" and encoder.null is not None:
            shared = (PurePosixPath(null_path(encoder.name)).name,)
        elif of == "captions":
            config["null"] = None
        self.groups = (Group(self.group, config, shared_files=shared),)

    def setup(self, run: RunFolder) -> None:
        """Writes the encoding of "", where it was given too."""
        name = f"{STORE}/{null_path(self.encoder.name)}"
        null = self.encoder.null_embedding() if self.of == "captions" else None
        if null is not None and run.storage.size(name) is None:
            if not is_finite_as(null, self.dtype):
                raise ConfigError(
                    f"encoders.{self.encoder.name}.null: {self.encoder.null} is not finite as {self.dtype}; use "
                    "store.dtype=bfloat16 or float32"
                )
            with run.storage.writing(name) as path:
                write_null(path, null, self.dtype)

    def process(self, task: Task) -> None:
        samples = read_samples(task.input(SAMPLES))
        given = self.source.precomputed(task.shard, self.encoder.array, [sample.input_row for sample in samples])
        tokens, bad = self._read(samples, given)
        tokens, unfit, quality = storable(tokens, self.encoder.dim, self.dtype, self.min_cosine)
        bad |= unfit
        if self.of == "captions":
            tokens, names = self._by_caption(samples, tokens, bad)
        else:
            names = [sample.key for sample in samples]
            tokens = [np.zeros((1, self.encoder.dim), np.float32) if row in bad else t for row, t in enumerate(tokens)]
        write_text_shard(
            task.output(self.group, ".h5" if self.store_format == "hdf5" else ".parquet"),
            tokens,
            self.encoder.dim,
            self.dtype,
            self.store_format,
            captions=names,
            fingerprint=self.fingerprint,
        )
        drops = [Drop(row, samples[row].key, *bad[row]) for row in sorted(bad)]
        info: dict[str, object] = {"excluded_rows": rows_by_reason(drops), **quantisation_facts(quality)}
        if self.of == "captions":
            info["captions"] = len(tokens)
        counters = {"embeddings": len(samples) - len(drops), "tokens": sum(map(len, tokens)), **quality}
        task.done(self.group, GroupResult(len(samples), drops, counters, info))

    def estimate_bytes(self, group: str, num_rows: int) -> int | None:
        return text_shard_bytes([1] * num_rows, self.encoder.dim, self.dtype) if self.of == "images" else None

    def _read(
        self, samples: Sequence[SampleRow], given: Iterable[PrecomputedEmbedding]
    ) -> tuple[list[np.ndarray], dict[int, tuple[str, str]]]:
        """The embedding of each sample, float32 (tokens, dim), and reason and detail where there is none."""
        found: list[np.ndarray] = []
        bad: dict[int, tuple[str, str]] = {}
        for row, (sample, one) in enumerate(zip(samples, given, strict=True)):
            array = np.zeros((0, self.encoder.dim)) if one.array is None else one.array
            tokens = without_padding(as_tokens(array, self.encoder.dim, one.where))
            if one.array is None:
                bad[row] = (one.reason, one.detail)
            elif not len(tokens):
                bad[row] = ("missing_embedding", "all zeros")
            elif self.of == "captions" and len(sample.captions) != 1:
                bad[row] = ("several_captions", f"{len(sample.captions)}, and one embedding")
            elif self.of == "images" and len(tokens) != 1:
                raise ConfigError(f"{one.where}: shape {array.shape}, but an image has one vector; check the array")
            found.append(tokens)
        return found, bad

    def _by_caption(
        self, samples: Sequence[SampleRow], found: Sequence[np.ndarray], bad: dict[int, tuple[str, str]]
    ) -> tuple[list[np.ndarray], list[str]]:
        """Embedding and text of each distinct caption: the first sample that has one decides."""
        names = {i: caption for s in samples for i, caption in zip(s.caption_ids, s.captions, strict=True)}
        chosen: dict[int, np.ndarray] = {}
        for row, (sample, tokens) in enumerate(zip(samples, found, strict=True)):
            if row not in bad:
                first = chosen.setdefault(sample.caption_ids[0], tokens)
                if first is not tokens and (
                    first.shape != tokens.shape or (token_errors(tokens, first).relative > _SAME).any()
                ):
                    bad[row] = ("other_embedding", "than a sample with the same caption")
        none = np.zeros((0, self.encoder.dim), np.float32)
        return [chosen.get(i, none) for i in range(len(names))], [names[i] for i in range(len(names))]
