"""precompute: sources -> fetch -> resize -> encode -> store."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import compress
from shlex import quote
from typing import Any

from imagen_core.store import (
    ORIGINAL_CAPTIONS,
    REMOVED,
    array_group,
    captions_group,
    image_embed_group,
    text_group,
)
from pipeline.engine.ledger import read_group_fingerprint
from pipeline.plan import Plan
from pipeline.resources import Resources
from pipeline.stage import Shard, Stage
from pipeline.storage.run_folder import SUMMARY, RunFolder
from pipeline.workflow import ShardedWorkflow
from stages.captioners.answers import delete_answers
from stages.captioners.base import CaptionerConfig, ModelCaptionerConfig
from stages.captioners.registry import AnyCaptioner
from stages.captioners.table import TableCaptionerConfig
from stages.captions import clean_captions
from stages.duplicates.excluded import ExcludedSets
from stages.duplicates.find import duplicates_line
from stages.encoders.base import EncoderConfig, FrozenModelConfig
from stages.encoders.given import PrecomputedEmbeddingsConfig
from stages.encoders.patches.config import PatchEncoderConfig
from stages.encoders.registry import AnyImageEmbedding, AnyTextEmbedding
from stages.encoders.tiny import TINY_MODEL
from stages.filters.base import Filter
from stages.filters.size import MaxPixels, blank_row, size_rejections
from stages.precompute.caption_losses import caption_losses, caption_losses_line
from stages.precompute.caption_sets import CaptionColumnStage, caption_sets_line, may_be_samples
from stages.precompute.captioning.costs import captions_line, expected_cost
from stages.precompute.captioning.make import MakeCaptionsStage
from stages.precompute.captioning.retry import retry_captions
from stages.precompute.captioning.take import TakeCaptionsStage
from stages.precompute.crops import crops_line, crops_of, measured
from stages.precompute.encode_images import EncodeImagesStage, EncodePatchesStage
from stages.precompute.encode_text import EncodeStage
from stages.precompute.fetch import ORIGINALS, SAMPLES, FetchStage
from stages.precompute.given_embeddings import PrecomputedEmbeddingsStage
from stages.precompute.images_config import ImagesConfig
from stages.precompute.lost_lists import lost_drops
from stages.precompute.make_arrays import array_stages
from stages.precompute.manifest import build_manifest, check_store_group
from stages.precompute.quantisation import quantisation_line, quantisation_summary
from stages.precompute.resize import ResizeStage
from stages.sources.annotations import AnnotationsConfig, CaptionColumn
from stages.sources.base import Source
from stages.sources.huggingface import HuggingfaceConfig
from stages.sources.ignored import ignored_line
from stages.sources.incremental import InputBatches, first_part
from stages.sources.original_sizes import original_sizes
from stages.stores import previous_header, run_removals
from workflows.gpus import gpus_of_models
from workflows.precompute_config import PrecomputeConfig


class Precompute(ShardedWorkflow):
    """Caches image pyramids and text embeddings of an image-text dataset."""

    name = "precompute"
    summary = "download and resize images, encode captions, into a store of cached tensors"
    config_class = PrecomputeConfig
    has_parts = True
    config: PrecomputeConfig

    def modules(self) -> Sequence[str]:
        models = [*self.config.encoders, *self.config.image_encoders]
        found = [name for model in models if isinstance(model, FrozenModelConfig) for name in model.modules]
        for captioner in self.config.captioners:
            found += captioner.modules() if isinstance(captioner, ModelCaptionerConfig) else ()
        return list(dict.fromkeys([EncodeStage.__module__, *ResizeStage.modules, *found])) if models or found else []

    def resources(self) -> Resources:
        config = self.config
        models = (*config.encoders, *config.image_encoders, *config.captioners, *config.stages)
        num_cpus = config.execution.num_cpus or (16 if config.images.sizes_px else 4)
        return Resources(float(num_cpus), gpus_of_models(models))

    def plan(self, run: RunFolder) -> Plan:
        config = self.config
        source = config.source.build()
        if isinstance(config.source, HuggingfaceConfig):
            source.resume(first_part(run))
        with source.reaching():
            source.check()
            rows = source.estimate_rows()
        if config.duplicates is not None:
            ExcludedSets(config.duplicates.exclude)  # which a mistyped path has none of
        run_removals(run, previous_header(run))  # before anything is deleted: without the log, samples come back
        stages = self._stages(source, run)
        made = [stage for stage in stages if isinstance(stage, MakeCaptionsStage)]
        batches = InputBatches(source, run, config.shard_size, SAMPLES)
        return Plan(
            stages=stages,
            check_group=check_store_group,
            shards=batches.shards,
            input=batches,
            finalize=lambda run, rows, failed, show: {
                **self._forget_answers(run),
                **build_manifest(run, rows, failed, config.duplicates, source.filtered, show, self._captions),
                **({"ignored": dict(sorted(source.ignored.items()))} if source.ignored.total() else {}),
                **({"unread_bytes": source.unread_bytes} if source.unread_bytes else {}),
            },
            final_file="store/manifest.json",
            lost_drops=partial(lost_drops, source=source),
            estimated_shards=None if rows is None else math.ceil(rows / config.shard_size),
            row_group=SAMPLES,
            max_drop_fraction=config.max_drop_fraction,
            keep=frozenset([ORIGINALS]) if config.keep_originals else frozenset(),
            shard_size=config.shard_size,
            no_parts=self._no_parts(),
            captions=source.captions,
            further_captions=partial(_further_captions, source, self._columns),
            outlook=partial(self._outlook, run, source),
            retry=lambda run, reasons: retry_captions(run, made, reasons),
            notices=tuple(
                f"encoder {encoder.name} has random weights ({TINY_MODEL}): its embeddings say nothing about the "
                f"captions; for real ones set encoders.{place}.model to a hub id or a folder"
                for place, encoder in enumerate(config.encoders)
                if isinstance(encoder, EncoderConfig) and encoder.model == TINY_MODEL
            ),
        )

    def _no_parts(self) -> str:
        for captioner in self.config.captioners:
            for limit in ("max_requests", "max_cost"):
                if getattr(captioner, limit, None) is not None:
                    return (
                        f"captioners.{captioner.name}.{limit} holds for one driver, and each part has its own; set it "
                        "to null, or run without --part"
                    )
        return ""

    @property
    def _columns(self) -> tuple[CaptionColumn, ...]:
        """The sets of captions of the source, if they have names."""
        source = self.config.source
        return source.captions if isinstance(source, AnnotationsConfig) else ()

    @property
    def _captions(self) -> tuple[CaptionColumn | CaptionerConfig, ...]:
        """All sets of captions, that of `samples` first, if they have names."""
        original = CaptionColumn(column=ORIGINAL_CAPTIONS)
        captioners = self.config.captioners
        return (*(self._columns or (original,)), *captioners) if captioners else self._columns

    @property
    def _further(self) -> tuple[CaptionColumn, ...]:
        """The sets of captions of the source but the first, which is that of `samples`."""
        return self._columns[1:]

    def _stages(self, source: Source, run: RunFolder) -> tuple[Stage, ...]:
        config = self.config
        stages = (
            FetchStage(source, config.source.kind),
            ResizeStage(
                config.images,
                config.store.format,
                config.filters,
                hashes=config.duplicates is not None,
                columns=source.column_types,
            ),
            *(CaptionColumnStage(captions, source) for captions in self._further),
            *(self._captions_stage(captioner, source) for captioner in config.captioners),
            *(self._text_stage(encoder, source, run) for encoder in config.encoders),
            *(self._image_stage(encoder, source, run) for encoder in config.image_encoders),
        )
        sets = [captions.called for captions in self._captions] or [ORIGINAL_CAPTIONS]
        return (*stages, *array_stages(config.stages, config.store.format, stages, sets))

    def _outlook(
        self, run: RunFolder, source: Source, shards: Sequence[Shard], rows_to_do: Mapping[str, float]
    ) -> dict[str, Mapping[str, object]]:
        """What will be cropped and filtered, and what captions will need."""
        found: dict[str, Mapping[str, object]] = {}
        found |= _outlook(source, self.config.images, self.config.filters, shards)
        for captioner in self.config.captioners:
            group = captions_group(captioner.name)
            if isinstance(captioner, ModelCaptionerConfig) and rows_to_do.get(group):
                found[group] = expected_cost(run, captioner, round(rows_to_do[group]))
        return found

    def _forget_answers(self, run: RunFolder) -> dict[str, object]:
        """Deletes the answers that were kept for shards which are committed now."""
        for captioner in self.config.captioners:
            delete_answers(run, captioner.name, set(run.recorded_shards(captions_group(captioner.name))))
        return {}

    def _captions_stage(self, captioner: AnyCaptioner, source: Source) -> Stage:
        if isinstance(captioner, TableCaptionerConfig):
            return TakeCaptionsStage(captioner)
        max_pixels = min(filter.max for filter in self.config.filters if isinstance(filter, MaxPixels))
        return MakeCaptionsStage(captioner, source.column_types, max_pixels)

    def _text_stage(self, encoder: AnyTextEmbedding, source: Source, run: RunFolder) -> Stage:
        store = self.config.store
        if isinstance(encoder, PrecomputedEmbeddingsConfig):
            return PrecomputedEmbeddingsStage(encoder, source, "captions", store.format, store.dtype, store.min_cosine)
        started = read_group_fingerprint(run, text_group(encoder.name))
        sets = [captions.called for captions in self._captions[1:]]
        return EncodeStage(encoder, store.format, store.dtype, store.min_cosine, started=started, caption_sets=sets)

    def _image_stage(self, encoder: AnyImageEmbedding, source: Source, run: RunFolder) -> Stage:
        store = self.config.store
        if isinstance(encoder, PrecomputedEmbeddingsConfig):
            return PrecomputedEmbeddingsStage(encoder, source, "images", store.format, store.dtype)
        if isinstance(encoder, PatchEncoderConfig):
            started = read_group_fingerprint(run, array_group(encoder.name))
            return EncodePatchesStage(encoder, self.config.images, store.format, store.min_cosine, started=started)
        started = read_group_fingerprint(run, image_embed_group(encoder.name))
        return EncodeImagesStage(encoder, self.config.images, store.format, store.dtype, started=started)

    def next_steps(self, run: RunFolder) -> list[tuple[str, str]]:
        summary = run.storage.read_json(SUMMARY)
        groups = summary["tally"]["groups"]
        summaries = {name: quantisation_summary(group["counters"]) for name, group in groups.items()}
        losses = {name: caption_losses(group["counters"]) for name, group in groups.items()}
        lines = {name: caption_losses_line(lost) for name, lost in losses.items() if lost}
        lines |= {name: line for name, group in groups.items() if (line := caption_sets_line(group["counters"]))}
        by_group = {captions_group(each.name): each for each in self.config.captioners}
        models = {name: each for name, each in by_group.items() if isinstance(each, ModelCaptionerConfig)}
        costs = {name: captions_line(models[name], groups[name]["counters"]) for name in models if name in groups}
        filtered = summary.get("filtered", 0)
        ignored, unread = ignored_line(summary.get("ignored", {})), summary.get("unread_bytes", 0)
        return [
            *([("unread", f"{unread:,} bytes of damaged files; see the drops damaged_tar")] if unread else []),
            *([("ignored", ignored)] if ignored else []),
            *([("duplicates", duplicates_line(found))] if (found := summary.get("duplicates")) else []),
            *([("crops", crops_line(crops))] if (crops := crops_of(groups[SAMPLES]["counters"])) else []),
            *([("filtered", f"{filtered:,} rows by source.where")] if filtered else []),
            *((name, line) for name, line in costs.items() if line),
            *((name, line) for name, line in lines.items() if line),
            *((name, f"as int8: {quantisation_line(summary)}") for name, summary in summaries.items() if summary),
            *(_retry_hint(summary) or _retry_step(summary, run, (SAMPLES, *models))),
            ("store", run.store_url),
            ("report", f"pipeline report {run.url}"),
            ("browse", f"pipeline browse {quote(run.url)}"),
            (
                "train",
                f"pipeline run train -c CONFIG --out NEW store={run.store_url}  (pipeline config ls lists CONFIG)",
            ),
        ]


def _further_captions(source: Source, sets: Sequence[CaptionColumn], shard: Shard) -> dict[str, list[tuple[str, ...]]]:
    """The captions of all `sets` but the first in the rows of a shard, without rows that are known to be dropped."""
    if len(sets) < 2:
        return {}
    first, *further = sets
    kept = may_be_samples(source, shard, first.column)
    cells = {captions.called: source.caption_cells(shard, captions.column) for captions in further}
    return {name: [clean_captions(cell or ())[0] for cell in compress(found, kept)] for name, found in cells.items()}


def _outlook(
    source: Source, images: ImagesConfig, filters: Sequence[Filter], shards: Sequence[Shard]
) -> dict[str, dict[str, object]]:
    """What will be cropped and which part passes the filters, as far as sizes of originals are at hand."""
    sizes, basis = original_sizes(source, shards) if images.sizes_px else ([], "")
    crops = measured(sizes, images.possible_shapes(), stored=images.aspect == "buckets")
    if not crops:
        return {}
    rows = (blank_row(*size, dict(images.shapes_of(*size, images.sizes_px))) for size in sizes)
    rejected, count = size_rejections(filters, rows), len(sizes)
    kept = 1 - rejected.total() / count
    shares = {reason: number / count for reason, number in rejected.most_common()}
    named = "".join(f", {reason} {share:.1%}" for reason, share in shares.items())
    return {
        "crops": {**crops.to_json(), "basis": basis, "text": f"{crops_line(crops)} ({basis})"},
        "sizes": {
            "kept": kept,
            "rejected": shares,
            "basis": basis,
            "text": f"{kept:.1%} of the images pass the filters by size{named} ({basis})",
        },
    }


def _retry_hint(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which option tries earlier drops again, if settings of the source changed after them."""
    changes = [change for change in summary.get("changed_settings", []) if change.startswith("source.")]
    drops = {reason: n for reason, n in summary["tally"]["groups"][SAMPLES]["drops"].items() if reason != REMOVED}
    if not changes or not drops or not summary["tally"]["shards_skipped"]:
        return []
    listed = ", ".join(f"{reason} {count}" for reason, count in drops.items())
    return [
        ("changed", "; ".join(changes)),
        ("", f"finished shards keep their drops ({listed}); --retry-dropped {','.join(drops)} tries them again"),
    ]


_MOST_REASONS = 3
"""So many reasons are named in a command; more are `all`."""


def _retry_step(summary: Mapping[str, Any], run: RunFolder, groups: Sequence[str]) -> list[tuple[str, str]]:
    """The command that tries the dropped rows of these groups again."""
    drops: Counter[str] = Counter()
    for group in groups:
        drops.update(summary["tally"]["groups"].get(group, {}).get("drops", {}))
    del drops[REMOVED]
    if not drops:
        return []
    reasons = ",".join(drops) if len(drops) <= _MOST_REASONS else "all"
    rows = f"{sum(drops.values()):,} row" + ("" if sum(drops.values()) == 1 else "s")
    return [("dropped", f"{rows}; pipeline run precompute --out {quote(run.url)} --retry-dropped {reasons}")]
