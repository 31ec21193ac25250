"""The samples of one shard of a store, as they are exported."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from imagen_core.store import (
    SAMPLES_GROUP,
    CaptionsFile,
    EmbeddingGroup,
    FileEntry,
    ImageFile,
    SampleRow,
    SamplesFile,
    StoreFolder,
    open_arrays,
    open_embeddings,
    open_images,
    restore,
)
from imagen_core.store.codec import check_codec, encode
from pipeline.stage import Drop, note_progress
from stages.exports.selection import Selection


@dataclass(frozen=True, slots=True)
class ExportSample:
    """One sample.

    Attributes:
        row: its fields.
        place: index of its shard, and its row there.
        images: a file of the codec that `Selection.image_codec` says, by size.
        text: by encoder, float (n_tokens, dim), or (n_tokens, layers, dim), of each caption.
        caption_sets: captions of further sets, by set; may be empty.
        set_text: by encoder and set, as `text`; without tokens where a caption could not be encoded.
        image_embeds: by encoder, float (dim,).
        arrays: by name, as `Sample.arrays`.
    """

    row: SampleRow
    place: tuple[int, int]
    images: dict[int, bytes]
    text: dict[str, list[np.ndarray]]
    caption_sets: dict[str, list[str]]
    set_text: dict[tuple[str, str], list[np.ndarray]]
    image_embeds: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Bytes of images, embeddings and arrays."""
        arrays = [
            *self.image_embeds.values(),
            *self.arrays.values(),
            *(a for rows in (*self.text.values(), *self.set_text.values()) for a in rows),
        ]
        return sum(map(len, self.images.values())) + sum(array.nbytes for array in arrays)


@dataclass
class ShardSamples:
    """The files of a shard, open; iterating gives its samples without the excluded ones.

    Attributes:
        drops: samples that the target cannot hold, once they were met.
        max_captions: most captions of a sample of the shard, by further set and under None of `row.captions`.
    """

    selection: Selection
    index: int
    files: Mapping[str, Any]
    excluded: Collection[int]
    drops: list[Drop] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._samples: SamplesFile = self.files[SAMPLES_GROUP]
        sets: dict[str, CaptionsFile] = {
            name: self.files[group.name] for name, group in self.selection.caption_sets.items()
        }
        rows = [row for row in range(self._samples.num_rows) if row not in self.excluded]
        self.max_captions: dict[str | None, int] = {
            name: max((len(file.caption_ids(row)) for row in rows), default=0)
            for name, file in {None: self._samples, **sets}.items()
        }

    def __iter__(self) -> Iterator[ExportSample]:
        number = 0
        for row in range(self._samples.num_rows):
            if row in self.excluded:
                continue
            note_progress()
            sample = self._samples.row(row)
            try:
                yield self._export(sample, row)
            except _CannotHold as error:
                self.drops.append(Drop(number, sample.key, error.reason, str(error)))
            number += 1

    def _export(self, sample: SampleRow, row: int) -> ExportSample:
        chosen = self.selection
        images = {size: self._image(chosen.image_codec(group), group, row) for size, group in chosen.images.items()}
        text = {name: self._embeddings(group, sample.caption_ids) for name, group in chosen.texts.items()}
        for name, rows in text.items():
            if chosen.to == "mds" and min(map(len, rows)) == 0:
                raise _CannotHold("no_tokens", f"{name}: a caption without tokens, which MDS cannot hold")
        sets: dict[str, CaptionsFile] = {name: self.files[group.name] for name, group in chosen.caption_sets.items()}
        set_text = {
            (encoder, name): self._embeddings(group, sets[name].caption_ids(row))
            for (encoder, name), group in chosen.set_texts.items()
        }
        embeds = {name: self._embedding(group, row)[0] for name, group in chosen.image_embeds.items()}
        arrays = {name: self.files[group.name].value(row) for name, group in chosen.arrays.items()}
        if chosen.to == "mds" and any(array.size == 0 for array in arrays.values()):
            raise _CannotHold("empty_array", "an array without elements, which MDS cannot hold")
        captions = {name: file.captions(row) for name, file in sets.items()}
        return ExportSample(sample, (self.index, row), images, text, captions, set_text, embeds, arrays)

    def _image(self, codec: str, group: Any, row: int) -> bytes:
        file: ImageFile = self.files[group.name]
        return file.stored(row).tobytes() if group.codec == codec else encode(file.pixels(row), check_codec(codec))

    def _embeddings(self, group: EmbeddingGroup, ids: Sequence[int]) -> list[np.ndarray]:
        rows = {i: self._embedding(group, i) for i in set(ids)}
        return [rows[i] for i in ids]

    def _embedding(self, group: EmbeddingGroup, row: int) -> np.ndarray:
        stored = self.files[group.name].stored(row)
        values = stored.values if group.dtype in ("float16", "float32") else restore(stored, group.dtype)  # no copy
        dtype = self.selection.float_dtype(group)
        if dtype == "float16" and group.dtype != "float16":
            with np.errstate(over="ignore"):
                values = values.astype(np.float16)
            if not np.isfinite(values).all():
                raise _CannotHold("non_finite_embedding", f"{group.encoder}: beyond the range of float16")
        return values.astype(dtype, copy=False)


class _CannotHold(Exception):
    """A sample that the target cannot hold."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@contextmanager
def open_shard(
    folder: StoreFolder, selection: Selection, index: int, entries: Mapping[str, FileEntry], excluded: Collection[int]
) -> Iterator[ShardSamples]:
    """Opens the files of a shard; each byte is compared with the manifest's sha256 first.

    Raises:
        StoreError: a file is missing, was changed, or cannot be read.
    """
    by_kind: tuple[tuple[Mapping[Any, Any], Callable[..., Any]], ...] = (
        (selection.images, open_images),
        (selection.texts, open_embeddings),
        (selection.set_texts, open_embeddings),
        (selection.image_embeds, open_embeddings),
        (selection.arrays, open_arrays),
    )
    openers: dict[str, Callable[..., Any]] = {
        group.name: partial(opener, group=group) for groups, opener in by_kind for group in groups.values()
    }
    openers[SAMPLES_GROUP] = SamplesFile
    openers |= {group.name: CaptionsFile for group in selection.caption_sets.values()}
    with ExitStack() as stack:
        files = {}
        for name, entry in entries.items():
            source = stack.enter_context(folder.checked(entry, every_byte=True))
            files[name] = openers[name](source, folder.path(entry.path))
        yield ShardSamples(selection, index, files, frozenset(excluded))
