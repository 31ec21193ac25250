"""A store opened for reading: samples by index, and loaders."""

import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from imagen_core.store.cache import DEFAULT_CACHE_BYTES, FileCache
from imagen_core.store.encoder_identity import PROBE
from imagen_core.store.errors import StoreError
from imagen_core.store.files.null import parse_null
from imagen_core.store.files.ragged import restore
from imagen_core.store.folder import StoreFolder
from imagen_core.store.layout import ColumnValue
from imagen_core.store.manifest import load_manifest
from imagen_core.store.probe import parse_probe
from imagen_core.store.read.options import LoaderOptions, takes_options_of
from imagen_core.store.read.reader import StoreReader
from imagen_core.store.records import EmbeddingGroup, TextGroup

if TYPE_CHECKING:
    from imagen_core.store.read.loader import Loader


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, with all its fields.

    Attributes:
        images: uint8 RGB (height, width, 3) by size in pixels; squares of that size, or of the shape of the sample's
            aspect-ratio bucket.
        text: by encoder, one (n_tokens, dim) array per caption, (n_tokens, layers, dim) where layers are stored apart;
            float16 for a float16 store, float32 for bfloat16, int8 and float32.
        image_embeds: by image encoder, (dim,) in the types of `text`.
        arrays: by name, what stages of other packages made, in the dtype and shape of the store's group; bfloat16 as
            float32, a number as an array without axes.
        width, height: pixels of the original image after EXIF orientation.
        sha256: hex digest of the original image file.
        transcription: the text written in the image, "" where there is none; None: unknown.
        safebox: the rectangle around that text: left, top, right, bottom in pixels of the original; None: unknown.
        label: the image's class, from 0; None: unknown.
        caption_sets: the captions by set, `captions` among them; none of a further set that the sample has not.
        set_texts: by further set and encoder, what `text` has of `captions`.
        columns: the values of the columns that were kept of the source (`source.keep_columns`), by name: bool, int,
            float or str; None for NULL.
    """

    key: str
    captions: list[str]
    url: str | None
    sha256: str
    width: int
    height: int
    images: dict[int, np.ndarray]
    text: dict[str, list[np.ndarray]]
    image_embeds: dict[str, np.ndarray]
    transcription: str | None = None
    safebox: tuple[int, int, int, int] | None = None
    label: int | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, ColumnValue] = field(default_factory=dict)
    caption_sets: dict[str, list[str]] = field(default_factory=dict)
    set_texts: dict[str, dict[str, list[np.ndarray]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """All fields, with types and shapes instead of the values of arrays."""
        values = ((one.name, getattr(self, one.name)) for one in fields(self))
        return f"Sample({', '.join(f'{name}={_short(value)}' for name, value in values)})"


def _short(value: object) -> str:
    """Like `repr`, but an array is its type and shape."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return repr(value)


class Store(StoreReader, Sequence[Sample]):
    """A finished store: a sequence of samples, without the excluded and the removed ones.

    It can be pickled and used after a fork: files are opened in the process that reads them. Use one
    object per thread.
    """

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        storage_options: dict[str, Any] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        max_open_shards: int = 64,
    ) -> "Store":
        """Open a store by its folder or its fsspec URL; local files are mapped into memory.

        Only the manifest is read. A data file is opened when a sample of it is first needed.

        Args:
            storage_options: what fsspec needs for the URL, such as keys or an endpoint.
            cache_dir: keep local copies of the files that are read here, checked by size and sha256; for
                remote stores. Processes may share it. None reads where the files are.
            cache_bytes: most bytes of cache_dir; least recently used files are removed.
            max_open_shards: shards whose files are kept open.
        Raises:
            ManifestError: manifest.json was changed.
            StoreError: not a store, an unfinished one, or one of a newer schema version.
        """
        cache = None if cache_dir is None else FileCache(cache_dir, cache_bytes)
        folder = StoreFolder(path, storage_options, cache)
        return cls(folder, load_manifest(folder), max_open_shards)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Read a sample, or a list of them for a slice; negative indices count from the end.

        Raises:
            IndexError: out of range.
            StoreError: a file of the sample is missing, truncated or unreadable, or the sample was removed since the
                store was opened.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, count = operator.index(index), len(self)
        if not -count <= number < count:
            raise IndexError(f"sample {number} of a store of {count}")
        return self._read(*self.locate(number % count))

    def __iter__(self) -> Iterator[Sample]:
        for i in range(len(self)):
            if self.locate(i) not in self.removed_since:
                yield self[i]

    def _read(self, shard: int, row: int) -> Sample:
        generation = self.generation
        if (shard, row) in self.removed_since:
            raise StoreError(f"{self._folder.url}: the sample was removed since the store was opened; open it again")
        files = self.shard(shard)
        key, captions, caption_ids, url, sha256, width, height, _, *annotations, columns = files.samples.fields(row)
        images = {size: np.array(files.images[size].pixels(row)) for size in self._sizes}
        text = {
            encoder: [restore(files.text[encoder].stored(i), dtype) for i in caption_ids]
            for encoder, dtype in self._dtypes.items()
        }
        embeds = {e: restore(files.image_embeds[e].stored(row), dtype)[0] for e, dtype in self._embed_dtypes.items()}
        arrays = {name: files.arrays[name].value(row) for name in self._manifest.arrays}
        caption_sets = {next(iter(self.caption_sets)): captions}
        caption_sets |= {name: files.caption_sets[name].captions(row) for name in self._manifest.captions}
        set_texts: dict[str, dict[str, list[np.ndarray]]] = {}
        for (encoder, name), group in self._manifest.set_texts.items():
            ids, file = files.caption_sets[name].caption_ids(row), files.set_texts[encoder, name]
            set_texts.setdefault(name, {})[encoder] = [restore(file.stored(i), group.dtype) for i in ids]
        if generation != self.generation:
            return self._read(shard, row)
        return Sample(
            key,
            captions,
            url,
            sha256,
            width,
            height,
            images,
            text,
            embeds,
            *annotations,
            arrays=arrays,
            columns=columns,
            caption_sets=caption_sets,
            set_texts=set_texts,
        )

    def null(self, encoder: str, layers: Sequence[int] | None = None) -> np.ndarray:
        """The encoding of "", in the shape and dtype that `Sample.text` has.

        Args:
            layers: those to return of an encoder whose layers are stored apart; None means all.
        Raises:
            ValueError: the store has no such encoder, or not these layers.
            StoreError: it has no null embedding, or the file is damaged.
        """
        group = self.text_group(encoder)
        if group.null is None:
            raise StoreError(f"{self._folder.path(group.name)}: encoder {encoder!r} has no null embedding")
        data = self._folder.read_checked(group.null)
        embedding, _ = parse_null(data, self._folder.path(group.null.path))
        embedding = embedding if layers is None else embedding[:, group.layer_places(layers)]
        return embedding if group.dtype == "float16" else embedding.astype(np.float32)

    def probe(self, encoder: str) -> dict[str, Any] | None:
        """What a text encoder made of a few fixed captions, and with which libraries; None if it was not recorded.

        Raises:
            ValueError: the store has no such encoder.
            StoreError: the file is damaged.
        """
        entry = self.text_group(encoder).probe
        if entry is None:
            return None
        return parse_probe(self._folder.read_checked(entry), self._folder.path(entry.path))

    def encoder_record(self, group: EmbeddingGroup, layers: Sequence[int] | None = None) -> dict[str, Any]:
        """What made the embeddings of a group: name, dim, dtype and fingerprint, with the layers that are read of it
        if it has any, and the probe if there is one.

        Args:
            layers: those that are read; None means all.
        Raises:
            StoreError: the probe's file is damaged.
        """
        fingerprint = dict(group.fingerprint)
        record: dict[str, Any] = {
            "name": group.encoder,
            "dim": group.dim,
            "dtype": group.dtype,
            "fingerprint": fingerprint,
        }
        if group.layers:
            record["layers"] = list(group.layers if layers is None else layers)
        if group.num_scales > 1:
            record["num_scales"] = group.num_scales
        probe = self.probe(group.encoder) if isinstance(group, TextGroup) else None
        return record if probe is None else {**record, PROBE: probe}

    @takes_options_of(LoaderOptions)
    def loader(self, options: LoaderOptions) -> "Loader":
        """A resumable loader of torch batches, see `Loader`; its keyword arguments are explained in `LoaderOptions`.

            loader = store.loader(batch_size=32, images=[64], text="t5", max_tokens=128, seed=0, rank=0, world_size=1)

        Raises:
            ValueError: a size or encoder the store lacks, or a number out of range.
            TypeError: an option that does not exist.
        """
        from imagen_core.store.read.loader import Loader  # torch: reading samples needs none

        return Loader(self, options)

    def __repr__(self) -> str:
        return f"Store({self._folder.url!r}, {len(self)} samples, images {self.image_sizes}, encoders {self.encoders})"
