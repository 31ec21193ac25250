"""Encodes the distinct captions of a shard with one frozen text encoder."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from imagen_core.store import (
    StoreDtype,
    StoreFormat,
    embedding_shard_bytes,
    is_finite_as,
    null_path,
    read_samples,
    write_null,
)
from pipeline.errors import MachineError
from pipeline.stage import Drop, Group, GroupResult, Resources, Stage, Task, Workload, rows_by_reason
from pipeline.storage.run_folder import STORE, RunFolder
from stages.encoders.base import EncoderConfig
from stages.encoders.encoder import TextEncoder, load_encoder
from stages.precompute.embedding_files import EmbeddingFiles
from stages.precompute.fetch import SAMPLES
from stages.precompute.quantisation import cast_for_store, quantisation_summary


class EncodeStage(Stage):
    """`samples` -> `text-NAME`: ragged embeddings, row j is caption id j. Workers keep the model."""

    identity = "EncodeStage"
    version = 3
    inputs = (SAMPLES,)
    tasks_per_worker = 3  # one in the model, one before it (read, tokenise), one after it (cast, write, sync)

    def __init__(self, encoder: EncoderConfig, store_format: StoreFormat, dtype: StoreDtype, min_cosine: float = 0.99):
        identity = encoder.identify()
        self.encoder = encoder.pinned(identity)
        self.files = EmbeddingFiles("text", encoder.name, identity.dim, dtype, store_format, identity.fingerprint)
        self.min_cosine = min_cosine
        self.name = f"encode-{encoder.name}"
        self.max_workers = encoder.workers or 0
        self.resources = Resources(encoder.num_cpus, encoder.num_gpus, encoder.resources)
        null_name = PurePosixPath(null_path(encoder.name)).name
        self.groups = (Group(self.files.group, self.files.config(min_cosine), shared_files=(null_name,)),)
        self._model: TextEncoder | None = None

    def setup(self, run: RunFolder) -> None:
        """Loads the model, and writes the encoding of "" for classifier-free guidance if it is missing."""
        self.encoder.check_unchanged(self.files.fingerprint)
        self._model = load_encoder(self.encoder, self.encoder.threads())
        name = f"{STORE}/{null_path(self.encoder.name)}"
        if run.storage.size(name) is None:
            embedding = self._model.encode([""]).embeddings[0]
            if not is_finite_as(embedding, self.files.dtype):
                raise MachineError(
                    f"encoders.{self.encoder.name}: the encoding of the empty caption is not finite as "
                    f"{self.files.dtype}; use store.dtype=bfloat16 or float32, or compute_dtype=float32"
                )
            with run.storage.writing(name) as path:
                write_null(path, embedding, self.files.dtype)

    def process(self, task: Task) -> None:
        assert self._model is not None
        samples = read_samples(task.input(SAMPLES))
        by_id = {i: c for s in samples for i, c in zip(s.caption_ids, s.captions, strict=True)}
        captions = [by_id[i] for i in range(len(by_id))]
        encoded = self._model.encode(captions)
        task.waited_s += encoded.waited_s
        files = self.files
        embeddings, bad, quality = cast_for_store(encoded.embeddings, files.dtype, self.min_cosine, files.blank)
        drops = [
            Drop(row, sample.key, *next(bad[i] for i in sample.caption_ids if i in bad))
            for row, sample in enumerate(samples)
            if not bad.keys().isdisjoint(sample.caption_ids)
        ]
        files.write(task, embeddings, captions)
        tokens = sum(len(embedding.values) for embedding in embeddings)
        counters = {
            "captions_encoded": len(captions),
            "tokens": tokens,
            "captions_truncated": encoded.num_truncated,
            "payload_bytes": tokens * files.dim * {"float32": 4, "int8": 1}.get(files.dtype, 2),
            **encoded.oom_counter(),
            **quality,
        }
        info = {"excluded_rows": rows_by_reason(drops), "captions": len(captions), **quantisation_summary(quality)}
        task.done(files.group, GroupResult(len(samples), drops, counters, info))

    def workload(self, captions: Sequence[tuple[str, ...]]) -> Workload:
        distinct = list(dict.fromkeys(caption for row in captions for caption in row))
        work = self.encoder.workload(distinct)
        return Workload(
            counter="tokens",
            units=sum(work.tokens),
            flops=work.flops,
            dtype=self.encoder.compute_dtype,
            bytes={self.files.group: embedding_shard_bytes(work.tokens, self.files.dim, self.files.dtype)},
        )
