"""Encodes the distinct captions of a shard with one frozen text encoder."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import PurePosixPath

from imagen_core.store import (
    StoreDtype,
    StoreFormat,
    captions_group,
    distinct_captions,
    dump_null,
    is_finite_as,
    null_path,
    parse_null,
    parse_probe,
    probe_path,
    read_captions,
    read_samples,
)
from pipeline.errors import MachineError, StaleOutputError
from pipeline.executors.local_worker import call_warm
from pipeline.resources import CaptionsBySet, RowsOfCaptions
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
    """`samples` -> `text-NAME`: ragged embeddings, row j is caption id j. Workers keep the model.

    Of each further set of captions, `captions-SET` -> `text-NAME-SET` likewise, by the same workers. A caption of such
    a set that cannot be encoded has no tokens: readers take another one, and the sample stays.
    """

    identity = "EncodeStage"
    version = 3
    tasks_per_worker = 3  # one in the model, one before it (read, tokenise), one after it (cast, write, sync)

    def __init__(
        self,
        encoder: EncoderConfig,
        store_format: StoreFormat,
        dtype: StoreDtype,
        min_cosine: float = 0.99,
        *,
        started: Mapping[str, object] | None = None,
        caption_sets: Sequence[str] = (),
    ):
        """
        Args:
            started: what the run folder's group was started with, if it was.
            caption_sets: further sets of captions to encode.
        """
        identity = call_warm(encoder.identify)
        fingerprint = identity_to_keep(identity.fingerprint, started)
        self.encoder = encoder.pinned(identity)
        self.files = EmbeddingFiles.of_text(encoder.name, identity, dtype, store_format, fingerprint, started)
        self.sets = {name: replace(self.files, kind="set_text", caption_set=name) for name in caption_sets}
        self.inputs = (SAMPLES, *map(captions_group, caption_sets))
        self.min_cosine = min_cosine
        self.name = f"encode-{encoder.name}"
        self.max_workers = encoder.workers or 0
        self.modules = encoder.modules
        self.resources = Resources(encoder.num_cpus, encoder.num_gpus, encoder.resources)
        self.shared = [null_path(encoder.name)]
        if is_complete(fingerprint):  # a group that an earlier version started has no probe, and gets none later
            self.shared.append(probe_path(encoder.name))
        names = tuple(PurePosixPath(path).name for path in self.shared)
        self.groups = (
            Group(self.files.group, self.files.config(min_cosine), shared_files=names, inputs=(SAMPLES,)),
            *(
                Group(files.group, files.config(min_cosine), inputs=(captions_group(name),))
                for name, files in self.sets.items()
            ),
        )
        self._model: TextEncoder | None = None

    def setup(self, run: RunFolder) -> None:
        """Loads the model; writes the encoding of "" for classifier-free guidance and the probe, or compares with
        those that the run has.

        Raises:
            MachineError: this worker's model is another one than the driver's.
            StaleOutputError: it gives other numbers than those that the run has.
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
                raise StaleOutputError(f"encoders.{self.encoder.name}: {name}: {problem}; {OTHER_NUMBERS}")

    def _keep_probe(self, shared: SharedFiles, model: TextEncoder) -> None:
        name, found = probe_path(self.encoder.name), take_probe(model)
        kept = shared.keep(name, lambda: json_text(found).encode())
        if kept is not None:
            problem = probe_problem(parse_probe(kept, name), found, self.encoder.compute_dtype)
            if problem is not None:
                raise StaleOutputError(f"encoders.{self.encoder.name}: {problem}; {OTHER_NUMBERS}")

    def process(self, task: Task) -> None:
        if self.files.group in task.wanted:
            samples = read_samples(task.input(SAMPLES))
            by_id = {i: c for s in samples for i, c in zip(s.caption_ids, s.captions, strict=True)}
            bad, result = self._encode(task, self.files, [by_id[i] for i in range(len(by_id))])
            drops = [
                Drop(row, sample.key, *next(bad[i] for i in sample.caption_ids if i in bad))
                for row, sample in enumerate(samples)
                if not bad.keys().isdisjoint(sample.caption_ids)
            ]
            info = {"excluded_rows": rows_by_reason(drops), **result.info}
            task.done(self.files.group, replace(result, rows=len(samples), drops=drops, info=info))
        for name, files in self.sets.items():
            if files.group in task.wanted:
                rows = read_captions(task.input(captions_group(name)))
                bad, result = self._encode(task, files, distinct_captions(rows))
                counters = {**result.counters, **({"captions_not_encoded": len(bad)} if bad else {})}
                task.done(files.group, replace(result, rows=len(rows), counters=counters))

    def _encode(
        self, task: Task, files: EmbeddingFiles, captions: Sequence[str]
    ) -> tuple[dict[int, tuple[str, str]], GroupResult]:
        """Writes the embeddings of some captions; returns which could not be encoded, with reason and detail, and what
        is known without the samples."""
        assert self._model is not None
        encoded = self._model.encode(captions)
        task.waited_s += encoded.waited_s
        found = [files.with_layers(embedding) for embedding in encoded.embeddings]
        encoded.embeddings.clear()
        embeddings, bad, quality = cast_for_store(found, files.dtype, self.min_cosine, files.blank, files.num_scales)
        for i, embedding in enumerate(embeddings):
            if i not in bad and not len(embedding.values):
                bad[i] = ("no_tokens", f"{captions[i]!r}")
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
        return bad, GroupResult(0, [], counters, {"captions": len(captions), **quantisation_summary(quality)})

    def workload(
        self, captions: RowsOfCaptions, further: CaptionsBySet | None = None, to_do: Set[str] | None = None
    ) -> Workload:
        files = {None: self.files, **self.sets}
        of_sets = further or {}
        work = {name: self._work(captions if name is None else of_sets.get(name, ())) for name in files}
        left = [name for name in files if to_do is None or files[name].group in to_do]
        return Workload(
            counter="tokens",
            units=sum(sum(work[name].tokens) for name in left),
            flops=sum(work[name].flops for name in left),
            dtype=self.encoder.compute_dtype,
            bytes={files[name].group: files[name].shard_bytes(each.tokens) for name, each in work.items()},
            bytes_otherwise={
                files[name].group: padded for name, each in work.items() if (padded := _padded(files[name], each))
            },
        )

    def _work(self, captions: RowsOfCaptions) -> EncoderWorkload:
        return self.encoder.workload(list(dict.fromkeys(caption for row in captions for caption in row)))


def _padded(files: EmbeddingFiles, work: EncoderWorkload) -> dict[str, int]:
    """What a cache of padded tensors would take, values alone; of one vector per caption there is no padding."""
    if work.most_tokens == 1:
        return {}
    dtype = "bfloat16" if files.dtype == "int8" else files.dtype
    size = len(work.tokens) * work.most_tokens * files.token_values * (4 if dtype == "float32" else 2)
    return {f"padded to {work.most_tokens} tokens in {dtype}": size}
