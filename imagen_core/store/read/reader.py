"""Reads the files of a store, shard by shard."""

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa

from imagen_core.store.buckets import Shape, choose_buckets
from imagen_core.store.errors import ADVICE, StoreError
from imagen_core.store.files.arrays import ArrayFile, open_arrays
from imagen_core.store.files.captions import CaptionsFile, read_caption_columns
from imagen_core.store.files.images import ImageFile, open_images
from imagen_core.store.files.layers import OnFirstUse
from imagen_core.store.files.samples import SamplesFile, read_columns
from imagen_core.store.files.shard import EmbeddingFile, open_embeddings
from imagen_core.store.folder import StoreFolder
from imagen_core.store.layout import REMOVED, SAMPLES_GROUP, ColumnType, StoreDtype
from imagen_core.store.manifest import Manifest
from imagen_core.store.read.choice import OWN_TYPES, chosen_rows, store_condition
from imagen_core.store.read.computed import computed_columns
from imagen_core.store.read.generations import Generations
from imagen_core.store.read.places import AllPlaces, ChosenPlaces, Places
from imagen_core.store.records import (
    ArrayGroup,
    EmbeddingGroup,
    ImageEmbedGroup,
    ImagesGroup,
    SetTextGroup,
    TextGroup,
    caption_weights,
)
from imagen_core.store.removal_log import load_removals

_FileT = TypeVar("_FileT", SamplesFile, CaptionsFile, ImageFile, EmbeddingFile, ArrayFile, pa.Table)
_ROWS_AT_ONCE = 1 << 16
_COLUMN_READERS = 16  # shards whose columns are read at the same time: files of a remote store take their time


class OpenShard:
    """The files of one shard, each opened when it is first needed.

    Attributes:
        images: the image file by size in pixels.
        text: the text file by encoder.
        caption_sets: the file of captions by further set.
        set_texts: the text file of a further set, by encoder and set.
        image_embeds: the file of image embeddings by encoder.
        arrays: the file of arrays by name.
    """

    def __init__(self, folder: StoreFolder, manifest: Manifest, generations: Generations, position: int) -> None:
        self._folder, self._generations, self._position = folder, generations, position
        self._manifest = manifest
        self.images: dict[int, ImageFile] = OnFirstUse(self._open_images)
        self.text: dict[str, EmbeddingFile] = OnFirstUse(
            lambda encoder: self._open_embeddings(manifest.texts[encoder])
        )
        self.caption_sets: dict[str, CaptionsFile] = OnFirstUse(
            lambda caption_set: self._file(manifest.captions[caption_set].name, CaptionsFile)
        )
        self.set_texts: dict[tuple[str, str], EmbeddingFile] = OnFirstUse(
            lambda which: self._open_embeddings(manifest.set_texts[which])
        )
        self.image_embeds: dict[str, EmbeddingFile] = OnFirstUse(
            lambda encoder: self._open_embeddings(manifest.image_embeds[encoder])
        )
        self.arrays: dict[str, ArrayFile] = OnFirstUse(self._open_arrays)

    @cached_property
    def samples(self) -> SamplesFile:
        return self._file(SAMPLES_GROUP, SamplesFile)

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Columns of `samples`, one row per row of the shard; see `read_columns`."""
        return self._file(SAMPLES_GROUP, lambda source, name: read_columns(source, name, names))

    def caption_columns(self, caption_set: str) -> pa.Table:
        """Columns of a further set of captions, one row per row of the shard; see `read_caption_columns`."""
        return self._file(self._manifest.captions[caption_set].name, read_caption_columns)

    def _open_images(self, size_px: int) -> ImageFile:
        group = self._manifest.images[size_px]
        return self._file(group.name, lambda source, name: open_images(source, name, group))

    def _open_embeddings(self, group: EmbeddingGroup) -> EmbeddingFile:
        return self._file(group.name, lambda source, name: open_embeddings(source, name, group))

    def _open_arrays(self, name: str) -> ArrayFile:
        group = self._manifest.arrays[name]
        return self._file(group.name, lambda source, path: open_arrays(source, path, group))

    def _file(self, group: str, opener: Callable[[Any, str], _FileT]) -> _FileT:
        if self._folder.is_local:
            self._generations.look(after_s=0)
        try:
            return self._open_now(group, opener)
        except StoreError:
            before = self._generations.number
            self._generations.look(after_s=0)
            if self._generations.number == before:
                raise
        return self._open_now(group, opener)

    def _open_now(self, group: str, opener: Callable[[Any, str], _FileT]) -> _FileT:
        entry = self._generations.entry(group, self._position)
        path = self._folder.path(entry.path)
        is_gone = self._folder.is_local and self._generations.is_gone
        try:
            with self._folder.checked(entry, every_byte=is_gone) as source:
                file = opener(source, path)
        except StoreError as error:
            if is_gone:
                raise StoreError(f"{error}; the store has no manifest now, as while a run makes it again") from error
            raise
        if file.num_rows != entry.rows:
            raise StoreError(f"{path}: {file.num_rows} rows, the manifest says {entry.rows}; {ADVICE}")
        return file


class StoreReader:
    """The files of a store by shard, a bounded number of them open, and where each sample is.

    It can be pickled and used after a fork: files are opened in the process that reads them. Use one object
    per thread.
    """

    def __init__(self, folder: StoreFolder, manifest: Manifest, max_open_shards: int = 64) -> None:
        """Most callers use `Store.open`."""
        self._folder = folder
        self._manifest = manifest
        self.max_open_shards = max_open_shards
        """Shards whose files are kept open."""
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._pid = os.getpid()
        self._sizes = list(manifest.images)
        self._buckets: tuple[tuple[Shape, ...], np.ndarray] | None = None
        self._dtypes: dict[str, StoreDtype] = {encoder: group.dtype for encoder, group in manifest.texts.items()}
        self._embed_dtypes: dict[str, StoreDtype] = {e: group.dtype for e, group in manifest.image_embeds.items()}
        self._caption_sets = caption_weights(manifest.header.get("captions", ()), manifest.captions)
        self._chosen: np.ndarray | None = None
        """Rows of all shards that conditions chose, bool; None without a condition."""
        self._places = self._places_without(manifest.excluded)
        self._generations = Generations(folder, manifest)
        self._open_of = 0
        """Number of the generation whose files are open."""

    @property
    def manifest(self) -> Manifest:
        """The manifest with which the store was opened."""
        return self._manifest

    @property
    def generation(self) -> int:
        """How often the store was changed while it was open: compacted, or samples removed. Looks once a minute."""
        self._generations.look()
        return self._generations.number

    @property
    def removed_since(self) -> frozenset[tuple[int, int]]:
        """Shard position and row of samples that were removed since the store was opened, as of the last look."""
        return self._generations.removed

    @property
    def image_sizes(self) -> list[int]:
        """Sizes of the images in pixels, rising."""
        return list(self._sizes)

    @property
    def encoders(self) -> list[str]:
        """Names of the text encoders, sorted."""
        return list(self._dtypes)

    @property
    def caption_sets(self) -> dict[str, float]:
        """The sets of captions by name, each with the weight that the source gave it: how often a loader takes its
        captions. The first is that of `Sample.captions`, of which each sample has some."""
        return dict(self._caption_sets)

    @property
    def image_encoders(self) -> list[str]:
        """Names of the image encoders, sorted."""
        return list(self._embed_dtypes)

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays that stages of other packages made, sorted."""
        return list(self._manifest.arrays)

    @property
    def columns(self) -> dict[str, ColumnType]:
        """Types of the columns that were kept of the source, by name."""
        return dict(self._manifest.columns)

    def __len__(self) -> int:
        return len(self._places)

    def locate(self, index: int) -> tuple[int, int]:
        """Shard position and row of a sample; index in [0, len(store))."""
        return self._places.locate(index)

    def places(self, num_removals: int | None = None) -> tuple[Places, set[tuple[int, int]]]:
        """Where the samples are that the store had after its first removals, and which of them were removed since.

        Args:
            num_removals: number of removals; None means all.
        Returns:
            The places, and the shard position and row of each sample that must not be read.
        """
        excluded = self._manifest.excluded
        if num_removals is None or num_removals == self._manifest.num_removals:
            return self._places, set()
        later = load_removals(self._folder, num_removals, self._manifest.listed_removals)
        del later[self._manifest.num_removals - num_removals :]
        named = {(index, row.row) for removal in later for index, rows in removal.rows.items() for row in rows}
        removed = {
            (shard, row)
            for shard, rows in excluded.items()
            for row, reason in rows.items()
            if reason == REMOVED and (int(self._manifest.index[shard]), row) in named
        }
        previous = {shard: [row for row in rows if (shard, row) not in removed] for shard, rows in excluded.items()}
        return self._places_without(previous), removed

    def _places_without(self, excluded: Mapping[int, Collection[int]]) -> Places:
        if self._chosen is None:
            return AllPlaces(self._manifest.rows, excluded)
        return ChosenPlaces(self._manifest.rows, excluded, self._chosen)

    def where(self, condition: str) -> Self:
        """The same store with only those samples for which a condition is true, in the same order.

            store.where("aesthetic >= 6 and width >= 512")

        Length, indices, loaders and their states are those of the chosen samples. A condition may name the kept
        columns; key, url, sha256, width, height, label and transcription; `caption_tokens.SET` (see
        `computed_columns`); and arrays that are numbers. Its language is that of `source.where` (see the docs, "Choose
        rows"). Of the files only what it names is read, once.

        Raises:
            ConditionError: a ValueError: it does not parse, or does not fit the columns.
            ImportError: sqlglot is not installed.
            StoreError: a file is missing or unreadable.
        """
        computed = computed_columns(self._manifest, list(self._caption_sets))
        kinds = {name: column.kind for name, column in computed.items()}
        parsed = store_condition(condition, self.columns, kinds, self._folder.url)
        stored = [name for name in parsed.columns if name in (*OWN_TYPES, *self.columns)]

        def read(position: int) -> np.ndarray:
            num_rows = int(self._manifest.rows[position])
            if not num_rows:
                return np.zeros(0, np.bool_)
            shard = OpenShard(self._folder, self._manifest, self._generations, position)
            found = shard.columns(stored) if stored else pa.table({})
            cells = {n: found[n] if n in stored else computed[n].read(shard) for n in parsed.columns}
            return chosen_rows(parsed, cells, num_rows)

        with ThreadPoolExecutor(_COLUMN_READERS) as readers:
            found = list(readers.map(read, range(len(self._manifest.rows))))
        chosen = np.concatenate(found) if found else np.zeros(0, np.bool_)
        return self._with_chosen(chosen if self._chosen is None else chosen & self._chosen)

    def where_as(self, other: "StoreReader") -> Self:
        """The same store with the samples that `other` has, a store of the same rows, by its conditions."""
        return self if other._chosen is None else self._with_chosen(other._chosen)

    def _with_chosen(self, chosen: np.ndarray) -> Self:
        store = copy.copy(self)
        store._chosen, store._open, store._pid = chosen, OrderedDict(), os.getpid()
        store._places = store._places_without(self._manifest.excluded)
        return store

    def sample_columns(self, names: Sequence[str]) -> pa.Table:
        """Columns of `samples` of the whole store, read from all shards: one row per row, excluded ones included.

        Shard after shard in the manifest's order, so that row r of the shard at position p is row
        `manifest.rows[:p].sum() + r`. A column that only some shards have is null in the others.

        Args:
            names: columns of the `samples` files, such as "width".
        Raises:
            ValueError: no shard has a column of that name.
            StoreError: a file is missing or unreadable.
        """

        def read(position: int) -> pa.Table:
            return OpenShard(self._folder, self._manifest, self._generations, position).columns(names)

        with ThreadPoolExecutor(_COLUMN_READERS) as readers:
            tables = list(readers.map(read, range(len(self._manifest.rows))))
        table = pa.concat_tables(tables, promote_options="default") if tables else pa.table({})
        missing = [name for name in table.column_names if pa.types.is_null(table.schema.field(name).type)]
        if missing:
            raise ValueError(f"the store's samples have no column {', '.join(missing)}")
        return table

    def buckets(self, ratios: tuple[Shape, ...]) -> np.ndarray:
        """The aspect-ratio bucket of each row, excluded ones included, as indices into `ratios`: one byte a row.

        Read once: the width and height of all samples, from every shard.

        Raises:
            StoreError: a file is missing or unreadable.
        """
        if self._buckets is None or self._buckets[0] != ratios:
            table = self.sample_columns(["width", "height"])
            small = np.min_scalar_type(len(ratios))
            parts = []
            for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
                widths, heights = batch.column("width").to_numpy(), batch.column("height").to_numpy()
                parts.append(choose_buckets(widths, heights, ratios).astype(small))
            self._buckets = ratios, np.concatenate([np.empty(0, np.uint8), *parts])
        return self._buckets[1]

    def image_group(self, size_px: int) -> ImagesGroup:
        """The group of one size; ValueError if there is none."""
        if size_px not in self._manifest.images:
            raise ValueError(f"images of {size_px} px are not in the store; it has {self.image_sizes}")
        return self._manifest.images[size_px]

    def text_group(self, encoder: str) -> TextGroup:
        """The group of one encoder; ValueError if there is none."""
        if encoder not in self._manifest.texts:
            raise ValueError(f"encoder {encoder!r} is not in the store; it has {self.encoders}")
        return self._manifest.texts[encoder]

    def set_text_group(self, encoder: str, caption_set: str) -> SetTextGroup:
        """The group of one encoder and further set of captions.

        Raises:
            ValueError: there is none, or not by the same encoder as the captions of `samples`.
        """
        group, first = self._manifest.set_texts.get((encoder, caption_set)), self.text_group(encoder)
        if group is None:
            raise ValueError(
                f"caption set {caption_set!r} is not encoded by {encoder!r} in the store; run precompute with this "
                "encoder and set, or give the set no weight"
            )
        if (group.dim, group.dtype, group.fingerprint) != (first.dim, first.dtype, first.fingerprint):
            raise ValueError(f"{group.name} is not made as {first.name}; make it again, or give the set no weight")
        return group

    def image_embed_group(self, encoder: str) -> ImageEmbedGroup:
        """The group of one image encoder; ValueError if there is none."""
        if encoder not in self._manifest.image_embeds:
            raise ValueError(f"image encoder {encoder!r} is not in the store; it has {self.image_encoders}")
        return self._manifest.image_embeds[encoder]

    def array_group(self, name: str) -> ArrayGroup:
        """The group of one array; ValueError if there is none."""
        if name not in self._manifest.arrays:
            raise ValueError(f"array {name!r} is not in the store; it has {self.arrays}")
        return self._manifest.arrays[name]

    def column_type(self, name: str) -> ColumnType:
        """The type of a column that was kept of the source; ValueError if there is none."""
        if name not in self._manifest.columns:
            raise ValueError(f"column {name!r} is not in the store; it has {sorted(self._manifest.columns)}")
        return self._manifest.columns[name]

    def shard(self, position: int) -> OpenShard:
        """The files of the shard at a position."""
        if self._pid != os.getpid():  # forked: the parent's handles are not ours
            self._open, self._pid = OrderedDict(), os.getpid()
        if self._open_of != self.generation:
            self._open, self._open_of = OrderedDict(), self._generations.number
        files = self._open.get(position)
        if files is not None:
            self._open.move_to_end(position)
            return files
        files = self._open[position] = OpenShard(self._folder, self._manifest, self._generations, position)
        if len(self._open) > self.max_open_shards:
            self._open.popitem(last=False)
        return files

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_pid": -1}
