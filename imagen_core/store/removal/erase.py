"""Rewrite one shard's files without the content of removed samples.

Rows keep their places, so that row i is still the same sample in every group, caption ids stay the same, and every
input row is still accounted for. An erased row has a blank key, no URL, NULL in kept columns, a black image, blank
hashes, empty captions (of further sets only those that no other sample has), and arrays of zeros, empty along axes
whose length differs. Its width and height are 0, or in a store of aspect-ratio buckets the ratio of its bucket, on
which the order of a loader depends. A caption that a remaining sample of the shard has too stays, with its embedding;
all others become "" with no tokens.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imagen_core.store.buckets import Shape, choose_shape, ratios_of
from imagen_core.store.errors import StoreError
from imagen_core.store.files.arrays import open_array_writer, open_arrays
from imagen_core.store.files.captions import CaptionsFile, RowCaptions, distinct_captions, write_captions
from imagen_core.store.files.hashes import HashesFile, ImageHashes, write_hashes
from imagen_core.store.files.images import open_image_writer, open_images
from imagen_core.store.files.ragged import cast_embedding
from imagen_core.store.files.samples import SamplesFile, write_samples
from imagen_core.store.files.shard import open_embeddings, write_embedding_shard
from imagen_core.store.layout import SampleRow
from imagen_core.store.records import (
    ArrayGroup,
    CaptionsGroup,
    EmbeddingGroup,
    Group,
    HashesGroup,
    ImagesGroup,
    OtherGroup,
    SetTextGroup,
    TextGroup,
)
from imagen_core.store.removal_log import blank_key

_NO_SHA256 = "0" * 64


@dataclass(frozen=True)
class ErasedShard:
    """The samples of a shard as they are once the removed ones are erased.

    Attributes:
        samples: all rows; erased ones are blank.
        captions: the distinct captions by id; "" if only removed samples had it.
        erased_ids: the ids of these captions.
        removed: the rows of removed samples.
        source: the `samples` file they were read from.
        sets: the captions of each further set, erased likewise; a removed sample keeps those of its ids that no other
            sample has.
    """

    samples: list[SampleRow]
    captions: list[str]
    erased_ids: frozenset[int]
    removed: frozenset[int]
    source: SamplesFile
    sets: Mapping[str, Sequence[RowCaptions]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        index: int,
        source: SamplesFile,
        removed: Collection[int],
        shapes: Sequence[Shape] = (),
        sets: Mapping[str, CaptionsFile] | None = None,
    ) -> "ErasedShard":
        """From the `samples` file of shard `index`, and its rows to erase; some may be erased already.

        Args:
            shapes: the aspect-ratio buckets of the store's images, of any size; none where they are squares.
            sets: the file of each further set of captions.
        """
        rows = [source.row(row) for row in range(source.num_rows)]
        pairs = [(i, c) for row in rows for i, c in zip(row.caption_ids, row.captions, strict=True)]
        alive = {i for number, row in enumerate(rows) if number not in removed for i in row.caption_ids}
        caption_of = {i: caption if i in alive else "" for i, caption in pairs}
        samples = [
            _blank(index, number, row, alive, caption_of, shapes) if number in removed else row
            for number, row in enumerate(rows)
        ]
        captions = [caption_of[i] for i in range(len(caption_of))]
        erased = {name: _erased_captions(file.rows(), removed) for name, file in (sets or {}).items()}
        return cls(samples, captions, frozenset(caption_of.keys() - alive), frozenset(removed), source, erased)

    def write(self, group: Group, old: str, new: Path) -> int:
        """Rewrite the group's file `old` as `new`; returns its number of rows. A failure removes `new`.

        Raises:
            StoreError: `old` cannot be read, or is of a kind that this version does not know.
        """
        if isinstance(group, ImagesGroup):
            self._write_images(group, old, new)
        elif isinstance(group, CaptionsGroup):
            write_captions(new, [sample.key for sample in self.samples], self.sets[group.caption_set])
        elif isinstance(group, EmbeddingGroup):
            return self._write_embeddings(group, old, new)
        elif isinstance(group, ArrayGroup):
            self._write_arrays(group, old, new)
        elif isinstance(group, HashesGroup):
            self._write_hashes(group, old, new)
        elif isinstance(group, OtherGroup):
            raise StoreError(
                f"{old}: kind {group.kind!r} of group {group.name!r} is of a later version of imagen-precompute, so "
                "removed rows of it cannot be erased; upgrade"
            )
        else:
            total, dropped = self.source.num_input_rows, self.source.dropped
            columns = self.source.column_types
            write_samples(new, self.samples, num_input_rows=total, dropped=dropped, columns=columns)
        return len(self.samples)

    def _write_images(self, group: ImagesGroup, old: str, new: Path) -> None:
        images = open_images(old, old, group)
        with open_image_writer(new, group.size_px, group.format, group.codec, group.shapes) as writer:
            for row, sample in enumerate(self.samples):
                if row in self.removed:
                    black = np.zeros((*group.shape_of(sample.width, sample.height), 3), np.uint8)
                    writer.append(black, sample.key, sample.sha256)
                else:
                    writer.append_stored(images.stored(row), images.shape(row), sample.key, sample.sha256)

    def _write_arrays(self, group: ArrayGroup, old: str, new: Path) -> None:
        arrays, blank = open_arrays(old, old, group), group.spec.blank()
        with open_array_writer(new, group.spec, group.format, group.fingerprint) as writer:
            for row, sample in enumerate(self.samples):
                writer.append_stored(blank if row in self.removed else arrays.stored(row), sample.key)

    def _write_hashes(self, group: HashesGroup, old: str, new: Path) -> None:
        hashes, blank = HashesFile(old, old, group), ImageHashes.blank(group)
        rows = [blank if row in self.removed else hashes.row(row) for row in range(hashes.num_rows)]
        write_hashes(new, group, rows, [(sample.key, sample.sha256) for sample in self.samples])

    def _write_embeddings(self, group: EmbeddingGroup, old: str, new: Path) -> int:
        file = open_embeddings(old, old, group)
        of_captions = isinstance(group, TextGroup | SetTextGroup)
        if isinstance(group, SetTextGroup):
            names = distinct_captions(self.sets[group.caption_set])
            erased = frozenset(i for i, caption in enumerate(names) if not caption)
        else:
            names = self.captions if of_captions else [sample.key for sample in self.samples]
            erased = self.erased_ids if of_captions else self.removed
        zeros = np.zeros((0 if of_captions else 1, *group.token_shape), np.float32)
        blank = cast_embedding(zeros, group.dtype, group.num_scales)
        num_tokens = [len(blank.values) if row in erased else int(n) for row, n in enumerate(file.num_tokens)]
        write_embedding_shard(
            new,
            (blank if row in erased else file.stored(row) for row in range(file.num_rows)),
            num_tokens,
            group.dim,
            group.dtype,
            group.format,
            captions=names,
            fingerprint=group.fingerprint,
            layers=group.layers,
            num_scales=group.num_scales,
        )
        return len(names)


def _erased_captions(rows: Sequence[RowCaptions], removed: Collection[int]) -> list[RowCaptions]:
    alive = {i for number, row in enumerate(rows) if number not in removed for i in row.ids}
    left = [tuple(i for i in row.ids if i not in alive) for row in rows]
    return [_blank_captions(row, left[number]) if number in removed else row for number, row in enumerate(rows)]


def _blank_captions(row: RowCaptions, ids: tuple[int, ...]) -> RowCaptions:
    made = len(ids) if row.seeds else 0
    return RowCaptions(("",) * len(ids), ids, (0,) * made, ("",) * made)


def _blank(
    index: int,
    number: int,
    row: SampleRow,
    alive: Collection[int],
    caption_of: dict[int, str],
    shapes: Sequence[Shape],
) -> SampleRow:
    """The erased row, with its ids that no remaining sample has, so that every id still occurs, or its first."""
    ids = tuple(i for i in row.caption_ids if i not in alive) or row.caption_ids[:1]
    captions = tuple(caption_of[i] for i in ids)
    height, width = choose_shape(row.width, row.height, ratios_of(shapes)) if shapes else (0, 0)
    return SampleRow(blank_key(index, number), captions, ids, None, _NO_SHA256, width, height, row.input_row)
