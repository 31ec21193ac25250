"""Stores precomputed embeddings: the ones that come with the data."""

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from imagen_core.store import (
    SampleRow,
    StoreDtype,
    StoreFormat,
    dump_null,
    embedding_shard_bytes,
    is_finite_as,
    null_path,
    read_samples,
    token_errors,
)
from pipeline.errors import ConfigError
from pipeline.stage import Drop, Group, GroupResult, Stage, Task, note_progress, rows_by_reason
from pipeline.storage.run_folder import RunFolder
from stages.encoders.given import PrecomputedEmbeddingsConfig, as_tokens, without_padding
from stages.precompute.embedding_files import EmbeddingFiles, SharedFiles
from stages.precompute.fetch import SAMPLES
from stages.precompute.quantisation import cast_for_store, quantisation_summary
from stages.sources.base import PrecomputedEmbedding, Source

_MAX_DIFFERENCE = 0.05
"""Largest relative error of a token between embeddings of one caption that were computed in different batches."""


class PrecomputedEmbeddingsStage(Stage):
    """`samples`, and the source's arrays -> `text-NAME` or `image-embed-NAME`. Row by row, nothing is computed.

    A text group has one embedding per distinct caption, so samples with equal captions must have equal embeddings, as
    any frozen encoder makes them; a sample with another embedding is dropped (`other_embedding`).
    """

    identity = "TakeGivenStage"
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
        self.files = EmbeddingFiles(
            "text" if of == "captions" else "image_embeds",
            encoder.name,
            encoder.dim,
            "float16" if dtype == "int8" and of == "images" else dtype,
            store_format,
            encoder.fingerprint(source.describe_array(encoder.array)),
        )
        self.min_cosine = min_cosine
        self.name = f"take-{self.files.group}"
        config = self.files.config(min_cosine)
        shared: tuple[str, ...] = ()
        if of == "captions" and encoder.null is not None:
            shared = (PurePosixPath(null_path(encoder.name)).name,)
        elif of == "captions":
            config["null"] = None
        self.groups = (Group(self.files.group, config, shared_files=shared),)

    def setup(self, run: RunFolder) -> None:
        """Writes the encoding of "" if it came with the data too."""
        null = self.encoder.null_embedding() if self.of == "captions" else None
        if null is None:
            return
        if not is_finite_as(null, self.files.dtype):
            raise ConfigError(
                f"encoders.{self.encoder.name}.null: {self.encoder.null} is not finite as {self.files.dtype}; use "
                "store.dtype=bfloat16 or float32"
            )
        shared = SharedFiles(run, self.files.group)
        shared.keep(null_path(self.encoder.name), lambda: dump_null(null, self.files.dtype))

    def process(self, task: Task) -> None:
        samples = read_samples(task.input(SAMPLES))
        arrays = self.source.precomputed(task.shard, self.encoder.array, [sample.input_row for sample in samples])
        tokens, bad = self._read(samples, arrays)
        blank = self.files.blank
        stored, unfit, quality = cast_for_store(list(tokens), self.files.dtype, self.min_cosine, blank)
        bad |= unfit
        if self.of == "captions":
            rows, names = self._by_caption(samples, tokens, bad)
            stored = [blank if row is None else stored[row] for row in rows]
        else:
            names = [sample.key for sample in samples]
            stored = [blank if row in bad else embedding for row, embedding in enumerate(stored)]
        self.files.write(task, stored, names)
        drops = [Drop(row, samples[row].key, *bad[row]) for row in sorted(bad)]
        info: dict[str, object] = {"excluded_rows": rows_by_reason(drops), **quantisation_summary(quality)}
        if self.of == "captions":
            info["captions"] = len(stored)
        num_tokens = sum(len(embedding.values) for embedding in stored)
        counters = {"embeddings": len(samples) - len(drops), "tokens": num_tokens, **quality}
        task.done(self.files.group, GroupResult(len(samples), drops, counters, info))

    def estimate_bytes(self, group: str, num_rows: int) -> int | None:
        return embedding_shard_bytes([1] * num_rows, self.files.dim, self.files.dtype) if self.of == "images" else None

    def _read(
        self, samples: Sequence[SampleRow], arrays: Iterable[PrecomputedEmbedding]
    ) -> tuple[list[np.ndarray], dict[int, tuple[str, str]]]:
        """The embedding of each sample, float32 (tokens, dim), and reason and detail where there is none."""
        found: list[np.ndarray] = []
        bad: dict[int, tuple[str, str]] = {}
        misfits: list[ConfigError] = []
        fitting = 0
        for row, (sample, one) in enumerate(zip(samples, arrays, strict=True)):
            note_progress()
            array = np.zeros((0, self.encoder.dim)) if one.array is None else one.array
            try:
                tokens = without_padding(as_tokens(array, self.encoder.dim, one.where))
            except ConfigError as error:
                if not one.has_own_file:
                    raise
                misfits.append(error)
                bad[row] = ("other_width", f"shape {array.shape}, and dim is {self.encoder.dim}")
                found.append(np.zeros((0, self.encoder.dim), np.float32))
                continue
            if one.array is None:
                bad[row] = (one.reason, one.detail)
                found.append(tokens)
                continue
            fitting += 1
            if not len(tokens):
                bad[row] = ("missing_embedding", "all zeros")
            elif self.of == "captions" and len(sample.captions) != 1:
                bad[row] = ("several_captions", f"{len(sample.captions)}, and one embedding")
            elif self.of == "images" and len(tokens) != 1:
                raise ConfigError(f"{one.where}: shape {array.shape}, but an image has one vector; check the array")
            found.append(tokens)
        if len(misfits) > 1 and not fitting:  # the width that is configured is wrong, not that of some files
            raise misfits[0]
        return found, bad

    def _by_caption(
        self, samples: Sequence[SampleRow], found: Sequence[np.ndarray], bad: dict[int, tuple[str, str]]
    ) -> tuple[list[int | None], list[str]]:
        """Row and text of each distinct caption: its embedding is that of the first sample with a good one."""
        names = {i: caption for s in samples for i, caption in zip(s.caption_ids, s.captions, strict=True)}
        chosen: dict[int, int] = {}
        for row, (sample, tokens) in enumerate(zip(samples, found, strict=True)):
            if row not in bad:
                first = found[chosen.setdefault(sample.caption_ids[0], row)]
                if first is not tokens and (
                    first.shape != tokens.shape or (token_errors(tokens, first).relative > _MAX_DIFFERENCE).any()
                ):
                    bad[row] = ("other_embedding", "than a sample with the same caption")
        return [chosen.get(i) for i in range(len(names))], [names[i] for i in range(len(names))]
