"""Where the images to evaluate come from: a folder or a store; or only their features, from files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import Field

from imagen_core.store import Store, StoreError
from imagen_core.store.read.reader import OpenShard
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.fingerprint import digest
from pipeline.storage.files import file_digest
from stages.images import MAX_PIXELS, read_image
from stages.images.files import square_side
from stages.places import local_folder
from stages.sampling.caption_sets import selection
from stages.sources.folder import IMAGE_SUFFIXES
from stages.sources.ignored import ignored_by_name
from stages.stores import open_store

T = TypeVar("T")

_DECODING = 2
"""Version of the rules by which files become pixels; features that were extracted by earlier ones are made again."""


@dataclass(frozen=True, slots=True)
class ImageSet:
    """A sequence of images."""

    identity: Mapping[str, object]
    """Changes when an image or the order does."""
    count: int
    read: Callable[[], Iterator[np.ndarray]]
    """uint8 RGB (h, w, 3) per image."""
    captions: Callable[[], Sequence[str] | None]
    """One per image; None if there are none."""
    sides: Callable[[], Iterator[int | None]]
    """Side of the centre square of each image in pixels, which models read; from the headers of files, None where they
    do not tell."""


class ImageFolder(Config):
    """Images of a folder and its subfolders, ordered by name."""

    kind: Literal["folder"] = "folder"
    path: str
    """The folder; a path or a URL. Captions, for the CLIP score, are read from NAME.txt next to NAME.png."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Largest width times height of an image; a larger one is an error that names it."""

    def open(self, field: str) -> ImageSet:
        folder = local_folder(self.path, f"{field}.path", _is_wanted)
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and ignored_by_name(str(path.relative_to(folder))) is None
        )
        if not files:
            raise ConfigError(f"{field}.path: {self.path} holds no images; give a folder with at least one")
        return image_files(files, partial(_texts_next_to, files), self.max_pixels)


class StoreImageSet(Config):
    """Images of a store, each with the first caption of its sample."""

    kind: Literal["store"] = "store"
    path: str
    """Store, or the run folder around it."""
    size_px: int | None = Field(default=None, ge=1)
    """Which size; null: the largest."""
    num_images: int | None = Field(default=None, ge=1)
    """How many to take without replacement; null: all."""
    seed: int = Field(default=0, ge=0)
    """Decides which are taken."""

    def open(self, field: str) -> ImageSet:
        store = open_store(self.path)
        chosen = range(len(store))
        if self.num_images is not None:
            what = f"{field}.num_images: {self.path}"
            chosen = sorted(selection(len(store), self.num_images, self.seed, what))
        size = self.size_px or max(store.image_sizes, default=0)
        return image_samples(store, self.path, size, chosen, field)


def image_samples(store: Store, path: str, size_px: int, samples: Sequence[int], field: str) -> ImageSet:
    """Images of these samples of a store, in this order, each with the first caption of its sample.

    Raises:
        ConfigError: the store has no images of this size.
    """
    if size_px not in store.image_sizes:
        raise ConfigError(f"{field}.size_px: {path} has no images of {size_px} px; it has {store.image_sizes}")
    identity = {
        "store": store.manifest.sha256,
        "removals": store.manifest.num_removals,
        "size_px": size_px,
        "samples": digest(list(samples)),
    }
    return ImageSet(
        identity,
        len(samples),
        partial(_stored_pixels, store, samples, size_px),
        partial(_stored_captions, store, samples),
        partial(_stored_sides, store, samples, size_px),
    )


class FeatureFiles(Config):
    """Features computed elsewhere, a row per image: .npy, or .safetensors with one tensor."""

    kind: Literal["features"] = "features"
    path: str | None = None
    """For distances."""
    model: str | None = None
    """The model that extracted them, for tables; null: as the file says."""
    logits: str | None = None
    """Of a classifier, for the Inception score."""
    clip_images: str | None = None
    """CLIP's embeddings of the images, for the CLIP score."""
    clip_texts: str | None = None
    """CLIP's embeddings of their captions."""


AnyImageSet = Annotated[ImageFolder | StoreImageSet | FeatureFiles, Field(discriminator="kind")]


def image_files(
    files: Sequence[Path], captions: Callable[[], Sequence[str] | None], max_pixels: int = MAX_PIXELS
) -> ImageSet:
    """Images of these files, identified by their content and by the rules of decoding."""
    identity = {"files": [file_digest(path) for path in files], "decoding": _DECODING}
    return ImageSet(
        identity, len(files), partial(_file_pixels, files, max_pixels), captions, lambda: map(square_side, files)
    )


def _is_wanted(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in (*IMAGE_SUFFIXES, ".txt") and ignored_by_name(name) is None


def _file_pixels(files: Sequence[Path], max_pixels: int) -> Iterator[np.ndarray]:
    return (read_image(path, max_pixels=max_pixels) for path in files)


def _texts_next_to(files: Sequence[Path]) -> list[str] | None:
    """The texts next to images; None if there are none."""
    texts = [path.with_suffix(".txt") for path in files]
    missing = [text for text in texts if not text.exists()]
    if len(missing) == len(texts):
        return None
    if missing:
        raise ConfigError(
            f"{missing[0]}: is missing, as {len(missing)} of {len(texts)} are; give each image a caption"
        )
    return [text.read_text("utf-8").strip() for text in texts]


def _stored_pixels(store: Store, chosen: Sequence[int], size_px: int) -> Iterator[np.ndarray]:
    return _of_samples(store, chosen, lambda files, row: files.images[size_px].pixels(row))


def _stored_sides(store: Store, chosen: Sequence[int], size_px: int) -> Iterator[int | None]:
    group = store.manifest.images[size_px]
    if not group.shapes:
        return repeat(size_px, len(chosen))
    return _of_samples(store, chosen, lambda files, row: min(group.shape_of(*files.samples.fields(row)[5:7])))


def _stored_captions(store: Store, chosen: Sequence[int]) -> list[str]:
    return list(_of_samples(store, chosen, lambda files, row: files.samples.fields(row)[1][0]))


def _of_samples(store: Store, chosen: Sequence[int], read: Callable[[OpenShard, int], T]) -> Iterator[T]:
    try:
        for index in chosen:
            shard, row = store.locate(index)
            yield read(store.shard(shard), row)
    except StoreError as error:
        raise ConfigError(str(error)) from error
