"""Turns originals into samples and their images at every size, each straight from the original."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from imagen_core.store import (
    REMOVED,
    Blocklist,
    ColumnType,
    ImageHashes,
    SampleRow,
    StoreFormat,
    image_group,
    open_image_writer,
    read_samples,
    write_hashes,
    write_samples,
)
from pipeline.errors import ConfigError, first_line
from pipeline.stage import Drop, Group, GroupResult, Stage, Task, note_progress, rows_by_reason
from pipeline.storage.run_folder import RunFolder
from stages.duplicates.hashing import HASHES, METHOD, hash_image
from stages.encoders.batches.memory import is_out_of_memory
from stages.filters.base import Filter, FilterRow
from stages.filters.registry import ALWAYS
from stages.filters.size import MaxPixels, TooSmall
from stages.images import ImageRejected, RejectReason, decode_rgb, pyramid_of_shapes
from stages.precompute.crops import crop_counters
from stages.precompute.fetch import NUM_REMOVALS, ORIGINALS, SAMPLES
from stages.precompute.images_config import ImagesConfig
from stages.precompute.originals import OriginalsReader, StoredOriginal
from stages.stores import known_removals

_HASHES_CONFIG = {
    "kind": "hashes",
    "method": METHOD,
    "num_perceptual": HASHES.num_perceptual,
    "thumbnail_px": HASHES.thumbnail_px,
}


_SHAPE_BYTES = 12
"""What a file has for each image whose shape it says, in addition to its pixels."""


class _Unusable(Exception):
    """A row that cannot become a sample, for another reason than an image that cannot be decoded."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class _Made:
    """What becomes of an original; without an image the sha256 is "" and the size 0 x 0."""

    sha256: str
    width: int
    height: int
    images: Mapping[str, np.ndarray]
    """By group."""
    hashes: ImageHashes | None = None
    """None if they are not wanted."""


class ResizeStage(Stage):
    """`originals` -> `samples`, one `images-SIZE` group per size and, to find duplicates, `hashes`.

    The first time a shard is seen, this stage decides which rows are samples. A size added later follows
    the rows as they are: a row that can no longer be made is excluded, and the others keep their places.
    """

    identity = "ResizeStage"
    name = "resize"
    version = 2
    inputs = (ORIGINALS,)

    def __init__(
        self,
        images: ImagesConfig,
        store_format: StoreFormat,
        filters: Sequence[Filter] = ALWAYS,
        *,
        hashes: bool = False,
        columns: Mapping[str, ColumnType] | None = None,
    ):
        self.images = images
        self.store_format: StoreFormat = store_format
        self.filters = tuple(filters)
        self.max_pixels = min(filter.max for filter in filters if isinstance(filter, MaxPixels))
        self.columns = dict(sorted((columns or {}).items()))
        for filter in self.filters:
            filter.check(self.columns)
        self.modules = ("torch", "scipy.fft") if hashes else ("torch",)
        kept = {"columns": self.columns} if self.columns else {}
        self.groups = (
            Group(SAMPLES, {"kind": "samples", **_filter_settings(filters), **kept}),
            *(
                Group(
                    image_group(size),
                    {
                        "kind": "images",
                        "size_px": size,
                        "codec": images.codec_of(size),
                        "format": store_format,
                        "config": images.group_config(size),
                    },
                    aligned_with=(SAMPLES,),
                )
                for size in images.sizes_px
            ),
            *([Group(HASHES.name, _HASHES_CONFIG, aligned_with=(SAMPLES,))] if hashes else []),
        )

    def setup(self, run: RunFolder) -> None:
        import torch

        torch.set_num_threads(1)  # shards are what runs in parallel

    def process(self, task: Task) -> None:
        with OriginalsReader(task.input(ORIGINALS)) as originals:
            if SAMPLES in task.wanted:
                self._begin_shard(task, originals)
            else:
                self._follow_samples(task, originals)

    def _begin_shard(self, task: Task, originals: OriginalsReader) -> None:
        """Decides the rows, and writes samples and images together.

        Rows that were removed from the store since they were fetched are no samples.
        """
        record = task.record(ORIGINALS)
        removals = known_removals(task.run)
        later = removals[record.info.get(NUM_REMOVALS, 0) if record else 0 :]
        blocklist = Blocklist(later)
        samples: list[SampleRow] = []
        drops: list[Drop] = []
        caption_ids: dict[str, int] = {}
        with _Writers(self, task) as writers:
            for entry in originals.entries:
                try:
                    if later and blocklist.blocks(entry.key, entry.url, originals.data(entry) if entry.size else None):
                        raise _Unusable(REMOVED, "")
                    made = self._make(entry, originals, writers)
                except (ImageRejected, _Unusable) as rejected:
                    drops.append(Drop(entry.row, entry.key, str(rejected.reason), rejected.detail))
                    continue
                sample = SampleRow(
                    key=entry.key,
                    captions=entry.captions,
                    caption_ids=tuple(caption_ids.setdefault(c, len(caption_ids)) for c in entry.captions),
                    url=entry.url,
                    sha256=made.sha256,
                    width=made.width,
                    height=made.height,
                    input_row=entry.row,
                    **entry.annotations,
                )
                writers.append(made, sample)
                samples.append(sample)
        path, num_rows = task.output(SAMPLES, ".parquet"), task.shard.num_rows
        dropped = rows_by_reason(drops)
        write_samples(path, samples, num_input_rows=num_rows, dropped=dropped, columns=self.columns)
        counters: dict[str, float] = {"captions": sum(len(s.captions) for s in samples)}
        counters["distinct_captions"] = len(caption_ids)
        sizes, stored = [(sample.width, sample.height) for sample in samples], self.images.aspect == "buckets"
        counters |= crop_counters(sizes, self.images.possible_shapes(), stored=stored)
        info: dict[str, object] = {NUM_REMOVALS: len(removals)}
        if found_before := Counter(str(entry.reason) for entry in originals.entries if entry.reason is not None):
            counters["found_before"] = found_before.total()
            info["found_before"] = dict(sorted(found_before.items()))
        task.done(SAMPLES, GroupResult(len(samples), drops, counters, info))
        for group in (*writers.groups, *([HASHES.name] if writers.hashes else [])):
            task.done(group, GroupResult(len(samples)))

    def _follow_samples(self, task: Task, originals: OriginalsReader) -> None:
        """Writes images for rows that are fixed already."""
        by_key = {entry.key: entry for entry in originals.entries if entry.reason != "duplicate_key"}
        samples = read_samples(task.input(SAMPLES))
        with _Writers(self, task) as writers:
            drops: list[Drop] = []
            for row, sample in enumerate(samples):
                made = None
                try:
                    entry = by_key.get(sample.key)
                    if entry is None:
                        raise _Unusable("source_changed", "the row is no longer in the source")
                    made = self._make(entry, originals, writers)
                    if made.sha256 != sample.sha256:
                        raise _Unusable("source_changed", "other bytes than when the samples were made")
                    if self.images.aspect == "buckets" and not sample.width:
                        raise ConfigError(
                            "images.aspect: buckets follow from the width and height of samples, which this run has "
                            "not, as it was begun with images.sizes_px=[]; give a new --out"
                        )
                except (ImageRejected, _Unusable) as rejected:
                    made = None
                    drops.append(Drop(row, sample.key, str(rejected.reason), rejected.detail))
                writers.append(made, sample)
        for group in writers.groups:
            info = {"excluded_rows": rows_by_reason(drops)}
            task.done(group, GroupResult(len(samples), drops, info=info))
        if writers.hashes:  # a sample without hashes stays one: it is not compared
            task.done(HASHES.name, GroupResult(len(samples), counters={"images_not_hashed": len(drops)}))

    def _make(self, entry: StoredOriginal, originals: OriginalsReader, wanted: "_Writers") -> _Made:
        """Hashes and decodes an original, and makes its images.

        Raises:
            _Unusable: the row was not fetched, or a filter rejects it.
            ImageRejected: the image cannot be decoded, or memory does not suffice.
        """
        note_progress()
        if entry.reason is not None:
            raise _Unusable(entry.reason, entry.detail)
        try:
            return self._make_fetched(entry, originals, wanted)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ImageRejected(RejectReason.OUT_OF_MEMORY, first_line(error)) from None  # releases what it held

    def _make_fetched(self, entry: StoredOriginal, originals: OriginalsReader, wanted: "_Writers") -> _Made:
        data = originals.data(entry)
        pixels, sizes = None, wanted.sizes
        if sizes or wanted.hashes:
            pixels = decode_rgb(data, max_pixels=self.max_pixels, orientation=entry.orientation).pixels
        height, width = (0, 0) if pixels is None else pixels.shape[:2]
        shapes = self.images.shapes_of(width, height, sizes)
        row = FilterRow(entry.key, entry.url, entry.captions, data, sizes, pixels, entry.annotations, shapes)
        for filter in self.filters:
            rejection = filter.reject(row)
            if rejection is not None:
                raise _Unusable(rejection.reason, rejection.detail)
        images = {} if pixels is None else pyramid_of_shapes(pixels, shapes, self.images.filter)
        sha256 = hashlib.sha256(data).hexdigest() if data else ""
        hashes = hash_image(pixels) if wanted.hashes and pixels is not None else None
        by_group = {image_group(size): image for size, image in images.items()}
        return _Made(sha256, width, height, by_group, hashes)

    def estimate_bytes(self, group: str, num_rows: int) -> int | None:
        sizes = {image_group(size): size for size in self.images.sizes_px}
        if group not in sizes:
            return num_rows * (HASHES.num_bytes if group == HASHES.name else 200)
        if self.images.codec_of(sizes[group]) != "raw":
            return None
        shapes = self.images.shapes(sizes[group])
        areas = [height * width for height, width in shapes] or [sizes[group] ** 2]
        return num_rows * (sum(areas) * 3 // len(areas) + (_SHAPE_BYTES if shapes else 0))


def _filter_settings(filters: Sequence[Filter]) -> dict[str, object]:
    """The filters in the fingerprint of the samples."""
    settings: dict[str, object] = {}
    others = []
    for filter in filters:
        if isinstance(filter, MaxPixels):
            settings["max_pixels"] = filter.max
        elif isinstance(filter, TooSmall):
            settings["too_small"] = filter.action
        else:
            others.append(filter.model_dump(mode="json"))
    return {**settings, "filters": others} if others else settings


class _Writers:
    """The open writers of the wanted image groups, and the hashes of these images if they are wanted."""

    def __init__(self, stage: ResizeStage, task: Task):
        self.sizes = tuple(s for s in stage.images.sizes_px if image_group(s) in task.wanted)
        self.hashes = HASHES.name in task.wanted
        self.groups = tuple(map(image_group, self.sizes))
        self._hashed: list[ImageHashes] = []
        self._hashed_of: list[tuple[str, str]] = []
        self.suffix = ".h5" if stage.store_format == "hdf5" else ".parquet"
        self.stage = stage
        self.task = task

    def __enter__(self) -> "_Writers":
        with ExitStack() as stack:
            self._writers = {
                size: stack.enter_context(
                    open_image_writer(
                        self.task.output(image_group(size), self.suffix),
                        size,
                        self.stage.store_format,
                        self.stage.images.codec_of(size),
                        self.stage.images.shapes(size),
                    )
                )
                for size in self.sizes
            }
            self._stack = stack.pop_all()
        return self

    def append(self, made: _Made | None, sample: SampleRow) -> None:
        """Adds the images and hashes of a sample; black and blank ones if it has none."""
        images = {} if made is None else made.images
        blank = self.stage.images.shapes_of(sample.width, sample.height, self.sizes)
        for size, writer in self._writers.items():
            pixels = images.get(image_group(size))
            pixels = np.zeros((*blank[size], 3), np.uint8) if pixels is None else pixels
            writer.append(pixels, sample.key, sample.sha256)
        if self.hashes:
            hashes = None if made is None else made.hashes
            self._hashed.append(ImageHashes.blank(HASHES) if hashes is None else hashes)
            self._hashed_of.append((sample.key, sample.sha256))

    def __exit__(self, *details: object) -> bool | None:
        if self.hashes and details[0] is None:
            write_hashes(self.task.output(HASHES.name, ".parquet"), HASHES, self._hashed, self._hashed_of)
        return self._stack.__exit__(*details)  # pyright: ignore[reportArgumentType]
