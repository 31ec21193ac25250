"""Read a store: `Store.open(path)[17]`."""

import operator
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from imagen_core.store.crop import Crop
from imagen_core.store.errors import ADVICE, StoreError
from imagen_core.store.files import StoreFolder
from imagen_core.store.layout import SAMPLES_GROUP
from imagen_core.store.manifest import Manifest, load_manifest
from imagen_core.store.null import parse_null
from imagen_core.store.parquet import SamplesFile
from imagen_core.store.ragged import restore
from imagen_core.store.records import FileEntry, ImagesGroup, TextGroup
from imagen_core.store.shard import ImageFile, TextFile, open_images, open_text

if TYPE_CHECKING:
    from imagen_core.store.loader import Loader

_FileT = TypeVar("_FileT", SamplesFile, ImageFile, TextFile)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, read whole.

    Attributes:
        images: uint8 RGB (S, S, 3) by size S in pixels.
        text: by encoder, one (n_tokens, dim) array a caption; float16 for a float16 store, float32
            for bfloat16, int8 and float32.
        width, height: pixels of the original picture after EXIF orientation.
        sha256: hex digest of the original image file.
    """

    key: str
    captions: list[str]
    url: str | None
    sha256: str
    width: int
    height: int
    images: dict[int, np.ndarray]
    text: dict[str, list[np.ndarray]]


class Store(Sequence[Sample]):
    """A finished store: a sequence of samples, without the excluded ones.

    It can be pickled and used after a fork: files are opened in the process that reads them. Use one
    object a thread.
    """

    def __init__(self, folder: StoreFolder, manifest: Manifest, max_open_files: int = 64) -> None:
        """Most callers want `Store.open`."""
        self._folder = folder
        self._manifest = manifest
        self._max_open_files = max_open_files
        self._open_files: dict[str, OrderedDict[int, Any]] = {}
        self._pid = os.getpid()
        valid = manifest.rows.copy()
        for shard, rows in manifest.excluded.items():
            valid[shard] -= len(rows)
        self._ends = np.cumsum(valid)  # readable samples up to and with each shard

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        storage_options: dict[str, Any] | None = None,
        max_open_files: int = 64,
    ) -> "Store":
        """Open a store by its folder or its fsspec URL; local files are mapped into memory.

        Only the manifest is read. A data file is looked at when a sample of it is first needed.

        Args:
            storage_options: what fsspec needs for the URL, such as keys or an endpoint.
            max_open_files: open files kept a group.
        Raises:
            ManifestError: manifest.json was changed.
            StoreError: not a store, an unfinished one, or one of a newer schema version.
        """
        folder = StoreFolder(path, storage_options)
        return cls(folder, load_manifest(folder), max_open_files)

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def image_sizes(self) -> list[int]:
        """Sizes of the pictures in pixels, rising."""
        return list(self._manifest.images)

    @property
    def encoders(self) -> list[str]:
        """Names of the text encoders, sorted."""
        return list(self._manifest.texts)

    def __len__(self) -> int:
        return self._manifest.num_samples

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
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of a store of {len(self)}")
        return self._read(*self.locate(number % len(self)))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def _read(self, shard: int, row: int) -> Sample:
        info = self.samples_file(shard).row(row)
        text: dict[str, list[np.ndarray]] = {}
        for encoder, group in self._manifest.texts.items():
            file = self.text_file(encoder, shard)
            text[encoder] = [restore(file.stored(i), group.dtype) for i in info.caption_ids]
        return Sample(
            key=info.key,
            captions=list(info.captions),
            url=info.url,
            sha256=info.sha256,
            width=info.width,
            height=info.height,
            images={size: np.array(self.image_file(size, shard).pixels(row)) for size in self.image_sizes},
            text=text,
        )

    def null(self, encoder: str) -> np.ndarray:
        """The encoding of "", (n_tokens, dim), in the dtype that `Sample.text` has.

        Raises:
            ValueError: the store has no such encoder.
            StoreError: it has no null embedding, or the file is damaged.
        """
        group = self.text_group(encoder)
        if group.null is None:
            raise StoreError(f"{self._folder.path(group.name)}: encoder {encoder!r} has no null embedding")
        self._check_size(group.null)
        data = self._folder.read_bytes(group.null.path)
        embedding, _ = parse_null(data, self._folder.path(group.null.path))
        return embedding if group.dtype == "float16" else embedding.astype(np.float32)

    def loader(
        self,
        batch_size: int,
        images: Sequence[int] | None = None,
        text: str | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        samples: range | None = None,
        crop: Crop | None = None,
    ) -> "Loader":
        """A resumable loader of torch batches; see `Loader`.

        Args:
            batch_size: samples a batch on this rank.
            images: sizes to load, in pixels; None loads no pictures.
            text: encoder to load; None loads no embeddings.
            max_tokens: cut longer embeddings at this many tokens; None cuts nothing.
            seed: decides the order and which of several captions is taken.
            shuffle: off, samples come in the store's order in every epoch.
            drop_last: leave out the last global batch if it is not full.
            samples: indices to load, a range of step 1; None loads the whole store.
            crop: a square of each picture instead of all of it; only that is read where pictures are raw.
        Raises:
            ValueError: a size or encoder the store lacks, or a number out of range.
        """
        from imagen_core.store.loader import Loader

        return Loader(
            self,
            batch_size=batch_size,
            images=images,
            text=text,
            max_tokens=max_tokens,
            seed=seed,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            drop_last=drop_last,
            samples=range(len(self)) if samples is None else samples,
            crop=crop,
        )

    def locate(self, index: int) -> tuple[int, int]:
        """Shard position and row of a sample; index in [0, len(store))."""
        shard = int(self._ends.searchsorted(index, side="right"))
        row = index - (int(self._ends[shard - 1]) if shard else 0)
        for excluded in self._manifest.excluded.get(shard, ()):
            row += excluded <= row
        return shard, row

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

    def samples_file(self, shard: int) -> SamplesFile:
        """The open `samples` file of the shard at a position."""
        return self._file(SAMPLES_GROUP, shard, SamplesFile)

    def image_file(self, size_px: int, shard: int) -> ImageFile:
        """The open image file of the shard at a position."""
        group = self.image_group(size_px)
        return self._file(group.name, shard, lambda source, name: open_images(source, name, group))

    def text_file(self, encoder: str, shard: int) -> TextFile:
        """The open text file of the shard at a position."""
        group = self.text_group(encoder)
        return self._file(group.name, shard, lambda source, name: open_text(source, name, group))

    def _file(self, group: str, shard: int, opener: Callable[[Any, str], _FileT]) -> _FileT:
        if self._pid != os.getpid():  # forked: the parent's handles are not ours
            self._open_files, self._pid = {}, os.getpid()
        files = self._open_files.setdefault(group, OrderedDict())
        if shard not in files:
            entry = self._manifest.file(group, shard)
            assert entry is not None, "a shard with samples has all files"
            self._check_size(entry)
            file = opener(self._folder.source(entry.path), self._folder.path(entry.path))
            if file.num_rows != entry.rows:
                path = self._folder.path(entry.path)
                raise StoreError(f"{path}: {file.num_rows} rows, the manifest says {entry.rows}; {ADVICE}")
            files[shard] = file
            if len(files) > self._max_open_files:
                files.popitem(last=False)
        files.move_to_end(shard)
        return files[shard]

    def _check_size(self, entry: FileEntry) -> None:
        path, size = self._folder.path(entry.path), self._folder.size_bytes(entry.path)
        if size is None:
            raise StoreError(f"{path}: missing; {ADVICE}")
        if size != entry.bytes:
            raise StoreError(f"{path}: {size} bytes, the manifest says {entry.bytes}; {ADVICE}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_files": {}, "_pid": -1}

    def __repr__(self) -> str:
        return f"Store({self._folder.url!r}, {len(self)} samples, images {self.image_sizes}, encoders {self.encoders})"
