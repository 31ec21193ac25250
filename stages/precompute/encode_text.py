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
    text_group,
    write_embedding_shard,
    write_null,
)
from pipeline.errors import MachineError
from pipeline.stage import Drop, Group, GroupResult, Resources, Stage, Task, Workload, rows_by_reason
from pipeline.storage.run_folder import STORE, RunFolder
from stages.encoders.base import EncoderConfig
from stages.encoders.encoder import TextEncoder, load_encoder
from stages.precompute.fetch import SAMPLES
from stages.precompute.quantisation import quantisation_facts, storable


class EncodeStage(Stage):
    """`samples` -> `text-NAME`: ragged embeddings, row j is caption id j. Workers keep the model."""

    identity = "EncodeStage"
    version = 3
    inputs = (SAMPLES,)
    tasks_per_worker = 3  # one in the model, one before it (read, tokenise), one after it (cast, write, sync)

    def __init__(self, encoder: EncoderConfig, store_format: StoreFormat, dtype: StoreDtype, min_cosine: float = 0.99):
        identity = encoder.identify()
        self.encoder = encoder.pinned(identity)
        self.store_format: StoreFormat = store_format
        self.dtype: StoreDtype = dtype
        self.min_cosine = min_cosine
        self.name = f"encode-{encoder.name}"
        self.group = text_group(encoder.name)
        self.max_workers = encoder.workers or 0
        self.resources = Resources(encoder.num_cpus, encoder.num_gpus, encoder.resources)
        self.dim, self.fingerprint = identity.dim, identity.fingerprint
        self.groups = (
            Group(
                self.group,
                {
                    "kind": "text",
                    "encoder": encoder.name,
                    "dim": self.dim,
                    "dtype": dtype,
                    "format": store_format,
                    "fingerprint": self.fingerprint,
                    **({"min_cosine": min_cosine} if dtype == "int8" else {}),
                },
                shared_files=(PurePosixPath(null_path(encoder.name)).name,),
            ),
        )
        self._model: TextEncoder | None = None

    def setup(self, run: RunFolder) -> None:
        """Loads the model, and writes the encoding of "" for classifier-free guidance if it is not there."""
        self.encoder.check_unchanged(self.fingerprint)
        self._model = load_encoder(self.encoder, self.encoder.threads())
        name = f"{STORE}/{null_path(self.encoder.name)}"
        if run.storage.size(name) is None:
            embedding = self._model.encode([""]).embeddings[0]
            if not is_finite_as(embedding, self.dtype):
                raise MachineError(
                    f"encoders.{self.encoder.name}: the encoding of the empty caption is not finite as "
                    f"{self.dtype}; use store.dtype=bfloat16 or float32, or compute_dtype=float32"
                )
            with run.storage.writing(name) as path:
                write_null(path, embedding, self.dtype)

    def process(self, task: Task) -> None:
        assert self._model is not None
        samples = read_samples(task.input(SAMPLES))
        by_id = {i: c for s in samples for i, c in zip(s.caption_ids, s.captions, strict=True)}
        captions = [by_id[i] for i in range(len(by_id))]
        encoded = self._model.encode(captions)
        task.waited_s += encoded.waited_s
        embeddings, bad, quality = storable(encoded.embeddings, self.dim, self.dtype, self.min_cosine)
        drops = [
            Drop(row, sample.key, *next(bad[i] for i in sample.caption_ids if i in bad))
            for row, sample in enumerate(samples)
            if not bad.keys().isdisjoint(sample.caption_ids)
        ]
        suffix = ".h5" if self.store_format == "hdf5" else ".parquet"
        path = task.output(self.group, suffix)
        write_embedding_shard(
            path, embeddings, self.dim, self.dtype, self.store_format, captions=captions, fingerprint=self.fingerprint
        )
        tokens = sum(len(e) for e in embeddings)
        counters = {
            "captions_encoded": len(captions),
            "tokens": tokens,
            "captions_truncated": encoded.num_truncated,
            "payload_bytes": tokens * self.dim * {"float32": 4, "int8": 1}.get(self.dtype, 2),
            **encoded.oom_counter(),
            **quality,
        }
        info = {"excluded_rows": rows_by_reason(drops), "captions": len(captions), **quantisation_facts(quality)}
        task.done(self.group, GroupResult(len(samples), drops, counters, info))

    def workload(self, captions: Sequence[tuple[str, ...]]) -> Workload:
        distinct = list(dict.fromkeys(caption for row in captions for caption in row))
        work = self.encoder.workload(distinct)
        return Workload(
            counter="tokens",
            units=sum(work.tokens),
            flops=work.flops,
            dtype=self.encoder.compute_dtype,
            bytes={self.group: embedding_shard_bytes(work.tokens, self.dim, self.dtype)},
        )
