"""Read a store: `Store.open(path)[17]`."""

import operator
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from imagen_core.store.cache import DEFAULT_CACHE_BYTES, FileCache
from imagen_core.store.crop import Framing
from imagen_core.store.errors import ADVICE, StoreError
from imagen_core.store.files import StoreFolder
from imagen_core.store.layout import REMOVED, SAMPLES_GROUP, StoreDtype
from imagen_core.store.manifest import Manifest, load_manifest
from imagen_core.store.null import parse_null
from imagen_core.store.parquet import SamplesFile
from imagen_core.store.places import Places
from imagen_core.store.ragged import restore
from imagen_core.store.records import EmbeddingGroup, ImageEmbedGroup, ImagesGroup, TextGroup
from imagen_core.store.removal import load_removals
from imagen_core.store.shard import ImageFile, TextFile, open_images, open_text

if TYPE_CHECKING:
    from imagen_core.store.loader import Loader

_FileT = TypeVar("_FileT", SamplesFile, ImageFile, TextFile)
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, read whole.

    Attributes:
        images: uint8 RGB (S, S, 3) by size S in pixels.
        text: by encoder, one (n_tokens, dim) array a caption; float16 for a float16 store, float32
            for bfloat16, int8 and float32.
        image_embeds: by picture encoder, (dim,) in the types of `text`.
        width, height: pixels of the original picture after EXIF orientation.
        sha256: hex digest of the original image file.
        transcription: the text written in the picture, "" where there is none; None: not known.
        safebox: the rectangle around that text: left, top, right, bottom in pixels of the original; None: not known.
        label: the picture's class, from 0; None: not known.
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


class Store(Sequence[Sample]):
    """A finished store: a sequence of samples, without the excluded and the removed ones.

    It can be pickled and used after a fork: files are opened in the process that reads them. Use one
    object a thread.
    """

    def __init__(self, folder: StoreFolder, manifest: Manifest, max_open_shards: int = 64) -> None:
        """Most callers want `Store.open`."""
        self._folder = folder
        self._manifest = manifest
        self._max_open_shards = max_open_shards
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._pid = os.getpid()
        self._sizes = list(manifest.images)
        self._dtypes: dict[str, StoreDtype] = {encoder: group.dtype for encoder, group in manifest.texts.items()}
        self._embed_dtypes: dict[str, StoreDtype] = {e: group.dtype for e, group in manifest.image_embeds.items()}
        self._places = Places(manifest.rows, manifest.excluded)

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

        Only the manifest is read. A data file is looked at when a sample of it is first needed.

        Args:
            storage_options: what fsspec needs for the URL, such as keys or an endpoint.
            cache_dir: keep local copies of the files that are read here, checked by size and sha256; for
                stores that are far away. Processes may share it. None reads where the files are.
            cache_bytes: most bytes of cache_dir; least recently used files are removed.
            max_open_shards: shards whose files are kept open.
        Raises:
            ManifestError: manifest.json was changed.
            StoreError: not a store, an unfinished one, or one of a newer schema version.
        """
        cache = None if cache_dir is None else FileCache(cache_dir, cache_bytes)
        folder = StoreFolder(path, storage_options, cache)
        return cls(folder, load_manifest(folder), max_open_shards)

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def image_sizes(self) -> list[int]:
        """Sizes of the pictures in pixels, rising."""
        return list(self._sizes)

    @property
    def encoders(self) -> list[str]:
        """Names of the text encoders, sorted."""
        return list(self._dtypes)

    @property
    def image_encoders(self) -> list[str]:
        """Names of the picture encoders, sorted."""
        return list(self._embed_dtypes)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Read a sample, or a list of them for a slice; negative indices count from the end.

        Raises:
            IndexError: out of range.
            StoreError: a file of the sample is missing, cut or unreadable.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, count = operator.index(index), len(self)
        if not -count <= number < count:
            raise IndexError(f"sample {number} of a store of {count}")
        return self._read(*self.locate(number % count))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def _read(self, shard: int, row: int) -> Sample:
        files = self.shard(shard)
        key, captions, caption_ids, url, sha256, width, height, _, *annotations = files.samples.fields(row)
        images = {size: np.array(files.images[size].pixels(row)) for size in self._sizes}
        text = {
            encoder: [restore(files.text[encoder].stored(i), dtype) for i in caption_ids]
            for encoder, dtype in self._dtypes.items()
        }
        embeds = {e: restore(files.image_embeds[e].stored(row), dtype)[0] for e, dtype in self._embed_dtypes.items()}
        return Sample(key, captions, url, sha256, width, height, images, text, embeds, *annotations)

    def null(self, encoder: str) -> np.ndarray:
        """The encoding of "", (n_tokens, dim), in the dtype that `Sample.text` has.

        Raises:
            ValueError: the store has no such encoder.
            StoreError: it has no null embedding, or the file is damaged.
        """
        group = self.text_group(encoder)
        if group.null is None:
            raise StoreError(f"{self._folder.path(group.name)}: encoder {encoder!r} has no null embedding")
        self._folder.check_size(group.null)
        data = self._folder.read_bytes(group.null.path)
        embedding, _ = parse_null(data, self._folder.path(group.null.path))
        return embedding if group.dtype == "float16" else embedding.astype(np.float32)

    def loader(
        self,
        batch_size: int,
        images: Sequence[int] | None = None,
        text: str | None = None,
        text_embed: str | None = None,
        image_embed: str | None = None,
        captions: bool = False,
        transcriptions: bool = False,
        labels: bool = False,
        max_tokens: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        samples: range | None = None,
        crop: Framing | None = None,
        shuffle_window_shards: int | None = None,
        pin_memory: bool = False,
    ) -> "Loader":
        """A resumable loader of torch batches; see `Loader`.

        Args:
            batch_size: samples a batch on this rank.
            images: sizes to load, in pixels; None loads no pictures.
            text: encoder to load; None loads no embeddings of captions.
            text_embed: text encoder of one vector a caption to load, of the caption `text` is of; None loads none.
            image_embed: picture encoder to load; None loads no embeddings of pictures.
            captions: load the caption that `text` is, or would be, of.
            transcriptions: load the text written in the pictures.
            labels: load the pictures' classes.
            max_tokens: cut longer embeddings at this many tokens; None cuts nothing.
            seed: decides the order and which of several captions is taken.
            shuffle: off, samples come in the store's order in every epoch.
            drop_last: leave out the last global batch if it is not full.
            samples: indices to load, a range of step 1; None loads the whole store.
            crop: a square of each picture instead of all of it, such as `Crop`; only that is read where pictures are
                raw.
            shuffle_window_shards: shards come in random order, and samples are shuffled within this many shards;
                for stores that are far away or larger than memory. None shuffles all samples with each other.
            pin_memory: batches in pinned memory, for asynchronous copies to a CUDA device.
        Raises:
            ValueError: a size or encoder the store lacks, or a number out of range.
        """
        from imagen_core.store.loader import Loader

        return Loader(
            self,
            batch_size=batch_size,
            images=images,
            text=text,
            text_embed=text_embed,
            image_embed=image_embed,
            captions=captions,
            transcriptions=transcriptions,
            labels=labels,
            max_tokens=max_tokens,
            seed=seed,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            drop_last=drop_last,
            samples=range(len(self)) if samples is None else samples,
            crop=crop,
            shuffle_window_shards=shuffle_window_shards,
            pin_memory=pin_memory,
        )

    def locate(self, index: int) -> tuple[int, int]:
        """Shard position and row of a sample; index in [0, len(store))."""
        return self._places.locate(index)

    def places(self, num_removals: int | None = None) -> tuple[Places, set[tuple[int, int]]]:
        """Where the samples are that the store had after its first removals; and which were removed since.

        Args:
            num_removals: None: all there are.
        Returns:
            The places; shard position and row of those that must not be read.
        """
        excluded = self._manifest.excluded
        if num_removals is None or num_removals == self._manifest.num_removals:
            return self._places, set()
        later = load_removals(self._folder, after=num_removals)[: self._manifest.num_removals - num_removals]
        named = {(index, row.row) for removal in later for index, rows in removal.rows.items() for row in rows}
        removed = {
            (shard, row)
            for shard, rows in excluded.items()
            for row, reason in rows.items()
            if reason == REMOVED and (int(self._manifest.index[shard]), row) in named
        }
        former = {shard: [row for row in rows if (shard, row) not in removed] for shard, rows in excluded.items()}
        return Places(self._manifest.rows, former), removed

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

    def image_embed_group(self, encoder: str) -> ImageEmbedGroup:
        """The group of one picture encoder; ValueError if there is none."""
        if encoder not in self._manifest.image_embeds:
            raise ValueError(f"image encoder {encoder!r} is not in the store; it has {self.image_encoders}")
        return self._manifest.image_embeds[encoder]

    def shard(self, position: int) -> "OpenShard":
        """The files of the shard at a position."""
        if self._pid != os.getpid():  # forked: the parent's handles are not ours
            self._open, self._pid = OrderedDict(), os.getpid()
        files = self._open.get(position)
        if files is not None:
            self._open.move_to_end(position)
            return files
        files = self._open[position] = OpenShard(self._folder, self._manifest, position)
        if len(self._open) > self._max_open_shards:
            self._open.popitem(last=False)
        return files

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_pid": -1}

    def __repr__(self) -> str:
        return f"Store({self._folder.url!r}, {len(self)} samples, images {self.image_sizes}, encoders {self.encoders})"


class OpenShard:
    """The files of one shard, each opened when it is first needed.

    Attributes:
        images: the image file by size in pixels.
        text: the text file by encoder.
        image_embeds: the file of picture embeddings by encoder.
    """

    def __init__(self, folder: StoreFolder, manifest: Manifest, position: int) -> None:
        self._folder, self._manifest, self._position = folder, manifest, position
        self.images: dict[int, ImageFile] = _Lazy(self._open_images)
        self.text: dict[str, TextFile] = _Lazy(lambda encoder: self._open_embeddings(manifest.texts[encoder]))
        self.image_embeds: dict[str, TextFile] = _Lazy(
            lambda encoder: self._open_embeddings(manifest.image_embeds[encoder])
        )

    @cached_property
    def samples(self) -> SamplesFile:
        return self._file(SAMPLES_GROUP, SamplesFile)

    def _open_images(self, size_px: int) -> ImageFile:
        group = self._manifest.images[size_px]
        return self._file(group.name, lambda source, name: open_images(source, name, group))

    def _open_embeddings(self, group: EmbeddingGroup) -> TextFile:
        return self._file(group.name, lambda source, name: open_text(source, name, group))

    def _file(self, group: str, opener: Callable[[Any, str], _FileT]) -> _FileT:
        entry = self._manifest.file(group, self._position)
        assert entry is not None, "a shard with samples has all files"
        path = self._folder.path(entry.path)
        with self._folder.checked(entry) as source:
            file = opener(source, path)
        if file.num_rows != entry.rows:
            raise StoreError(f"{path}: {file.num_rows} rows, the manifest says {entry.rows}; {ADVICE}")
        return file


class _Lazy(dict[_Key, _Value]):
    """A dict that makes a value when its key is first asked for."""

    def __init__(self, make: Callable[[_Key], _Value]) -> None:
        self._make = make

    def __missing__(self, key: _Key) -> _Value:
        value = self[key] = self._make(key)
        return value
