"""Encodes the distinct captions of a shard with one frozen text encoder."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from imagen_core.store import (
    StoreDtype,
    StoreFormat,
    dump_null,
    is_finite_as,
    null_path,
    parse_null,
    parse_probe,
    probe_path,
    read_samples,
)
from pipeline.errors import MachineError
from pipeline.executors.local_worker import call_warm
from pipeline.stage import Drop, Group, GroupResult, Resources, Stage, Task, Workload, rows_by_reason
from pipeline.storage.files import json_text
from pipeline.storage.run_folder import RunFolder
from stages.encoders.base import EncoderConfig, EncoderWorkload
from stages.encoders.encoder import TextEncoder, load_encoder
from stages.encoders.identity import identity_to_keep, is_complete
from stages.encoders.probe import OTHER_NUMBERS, null_problem, probe_problem, take_probe
from stages.precompute.embedding_files import EmbeddingFiles, SharedFiles
from stages.precompute.fetch import SAMPLES
from stages.precompute.quantisation import cast_for_store, quantisation_summary


class EncodeStage(Stage):
    """`samples` -> `text-NAME`: ragged embeddings, row j is caption id j. Workers keep the model."""

    identity = "EncodeStage"
    version = 3
    inputs = (SAMPLES,)
    tasks_per_worker = 3  # one in the model, one before it (read, tokenise), one after it (cast, write, sync)

    def __init__(
        self,
        encoder: EncoderConfig,
        store_format: StoreFormat,
        dtype: StoreDtype,
        min_cosine: float = 0.99,
        *,
        started: Mapping[str, object] | None = None,
    ):
        """`started`: what the run folder's group was started with, if it was."""
        identity = call_warm(encoder.identify)
        fingerprint = identity_to_keep(identity.fingerprint, started)
        self.encoder = encoder.pinned(identity)
        self.files = EmbeddingFiles.of_text(encoder.name, identity, dtype, store_format, fingerprint, started)
        self.min_cosine = min_cosine
        self.name = f"encode-{encoder.name}"
        self.max_workers = encoder.workers or 0
        self.modules = encoder.modules
        self.resources = Resources(encoder.num_cpus, encoder.num_gpus, encoder.resources)
        self.shared = [null_path(encoder.name)]
        if is_complete(fingerprint):  # a group that an earlier version started has no probe, and gets none later
            self.shared.append(probe_path(encoder.name))
        names = tuple(PurePosixPath(path).name for path in self.shared)
        self.groups = (Group(self.files.group, self.files.config(min_cosine), shared_files=names),)
        self._model: TextEncoder | None = None

    def setup(self, run: RunFolder) -> None:
        """Loads the model; writes the encoding of "" for classifier-free guidance and the probe, or compares with
        those that the run has.

        Raises:
            MachineError: the model is another one than the run started with, or gives other numbers.
        """
        self.encoder.check_unchanged(self.files.fingerprint)
        self._model = load_encoder(self.encoder, self.encoder.threads())
        shared = SharedFiles(run, self.files.group)
        self._keep_null(shared, self._model)
        if len(self.shared) > 1:
            self._keep_probe(shared, self._model)

    def _keep_null(self, shared: SharedFiles, model: TextEncoder) -> None:
        name, dtype = null_path(self.encoder.name), self.files.dtype
        embedding = self.files.with_layers(model.encode([""]).embeddings[0])

        def dump() -> bytes:
            if not is_finite_as(embedding, dtype):
                raise MachineError(
                    f"encoders.{self.encoder.name}: the encoding of the empty caption is not finite as {dtype}; use "
                    "store.dtype=bfloat16 or float32, or compute_dtype=float32"
                )
            return dump_null(embedding, dtype)

        kept = shared.keep(name, dump)
        if kept is not None:
            stored, _ = parse_null(kept, name)
            problem = null_problem(stored, embedding, self.encoder.compute_dtype, dtype)
            if problem is not None:
                raise MachineError(f"encoders.{self.encoder.name}: {name}: {problem}; {OTHER_NUMBERS}")

    def _keep_probe(self, shared: SharedFiles, model: TextEncoder) -> None:
        name, found = probe_path(self.encoder.name), take_probe(model)
        kept = shared.keep(name, lambda: json_text(found).encode())
        if kept is not None:
            problem = probe_problem(parse_probe(kept, name), found, self.encoder.compute_dtype)
            if problem is not None:
                raise MachineError(f"encoders.{self.encoder.name}: {problem}; {OTHER_NUMBERS}")

    def process(self, task: Task) -> None:
        assert self._model is not None
        samples = read_samples(task.input(SAMPLES))
        by_id = {i: c for s in samples for i, c in zip(s.caption_ids, s.captions, strict=True)}
        captions = [by_id[i] for i in range(len(by_id))]
        encoded = self._model.encode(captions)
        task.waited_s += encoded.waited_s
        files = self.files
        found = [files.with_layers(embedding) for embedding in encoded.embeddings]
        encoded.embeddings.clear()
        embeddings, bad, quality = cast_for_store(found, files.dtype, self.min_cosine, files.blank, files.num_scales)
        for i, embedding in enumerate(embeddings):
            if i not in bad and not len(embedding.values):
                bad[i] = ("no_tokens", f"{captions[i]!r}")
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
            "unk_tokens": encoded.num_unknown,
            "payload_bytes": tokens * files.token_values * {"float32": 4, "int8": 1}.get(files.dtype, 2),
            **encoded.oom_counter(),
            **quality,
        }
        info = {"excluded_rows": rows_by_reason(drops), "captions": len(captions), **quantisation_summary(quality)}
        task.done(files.group, GroupResult(len(samples), drops, counters, info))

    def _padded_bytes(self, work: EncoderWorkload) -> dict[str, dict[str, int]]:
        """What a cache of padded tensors would take, values alone; of one vector per caption there is no padding."""
        if work.most_tokens == 1:
            return {}
        dtype = "bfloat16" if self.files.dtype == "int8" else self.files.dtype
        size = len(work.tokens) * work.most_tokens * self.files.token_values * (4 if dtype == "float32" else 2)
        return {self.files.group: {f"padded to {work.most_tokens} tokens in {dtype}": size}}

    def workload(self, captions: Sequence[tuple[str, ...]]) -> Workload:
        distinct = list(dict.fromkeys(caption for row in captions for caption in row))
        work = self.encoder.workload(distinct)
        return Workload(
            counter="tokens",
            units=sum(work.tokens),
            flops=work.flops,
            dtype=self.encoder.compute_dtype,
            bytes={self.files.group: self.files.shard_bytes(work.tokens)},
            bytes_otherwise=self._padded_bytes(work),
        )
