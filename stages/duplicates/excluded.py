"""Images that must not be in training: folders of images, stores, and lists of hashes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from imagen_core.store import MANIFEST_NAME, ImageHashes, Store, StoreError
from pipeline.errors import ConfigError
from pipeline.storage.files import file_digest
from pipeline.storage.open import open_storage
from stages.duplicates.hashing import hash_image, hash_part
from stages.images import MAX_PIXELS, read_image
from stages.lines import split_lines
from stages.places import local_file, local_folder
from stages.sources.folder import IMAGE_SUFFIXES
from stages.sources.ignored import ignored_by_name
from stages.stores import open_store, store_folder

_FIELD = "duplicates.exclude"
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class ExcludedImage:
    """An image that must not be in training."""

    place: str
    """As the configuration names the set."""
    name: str
    """The file in the folder, the key in the store, or the hash in the list."""


class ExcludedSets:
    """All sets of `duplicates.exclude`.

    Raises:
        ConfigError: one is neither a folder with images, nor a store with images, nor a list of hashes.
    """

    def __init__(self, places: Sequence[str]):
        self._folders: dict[str, list[str]] = {}
        self._local: dict[str, Path] = {}
        self._stores: dict[str, Store] = {}
        self._listed: dict[str, list[str]] = {}
        for place in places:
            self._open(place)

    def _open(self, place: str) -> None:
        if PurePosixPath(place).suffix == ".txt" if "://" in place else Path(place).is_file():
            self._listed[place] = list(_hashes_in(place))
        elif open_storage(store_folder(place)).size(MANIFEST_NAME) is not None:
            self._stores[place] = open_store(place)
            if not self._stores[place].image_sizes:
                raise ConfigError(f"{_FIELD}: {place} is a store without images; give one that has, or a folder")
        else:
            folder = self._local[place] = local_folder(place, _FIELD, _is_image)
            names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
            self._folders[place] = sorted(filter(_is_image, names))
            if not self._folders[place]:
                raise ConfigError(f"{_FIELD}: {place} holds no images; give a folder with at least one, or a store")

    def identity(self) -> Mapping[str, object]:
        """Changes when an image does."""
        files = {
            place: [[name, file_digest(self._local[place] / name)] for name in names]
            for place, names in self._folders.items()
        }
        stores = {place: [store.manifest.sha256, store.manifest.num_removals] for place, store in self._stores.items()}
        return {"listed": self._listed, "folders": files, "stores": stores}

    def digests(self) -> dict[str, ExcludedImage]:
        """What is named by a SHA-256, of a file or of decoded pixels, in lower-case hex digits: the lists, and the
        original files of stores."""
        found = {value: ExcludedImage(place, value) for place, values in self._listed.items() for value in values}
        for place, store in self._stores.items():
            for shard, row in map(store.locate, range(len(store))):
                samples = store.shard(shard).samples
                found.setdefault(samples.texts("sha256")[row], ExcludedImage(place, samples.key(row)))
        return found

    def images(self) -> Iterator[tuple[ExcludedImage, ImageHashes]]:
        """All images of folders and stores (there as they are stored, the largest), one in memory at a time.

        Raises:
            ConfigError: one cannot be read; names it.
        """
        for place, names in self._folders.items():
            for name in names:
                pixels = read_image(self._local[place] / name, max_pixels=MAX_PIXELS)
                yield ExcludedImage(place, name), hash_image(pixels)
        for place, store in self._stores.items():
            size_px = max(store.image_sizes)
            try:
                for shard, row in map(store.locate, range(len(store))):
                    files = store.shard(shard)
                    name, pixels = files.samples.key(row), files.images[size_px].pixels(row)
                    yield ExcludedImage(place, name), hash_part(pixels, *files.samples.size(row))
            except StoreError as error:
                raise ConfigError(f"{_FIELD}: {error}") from error


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and ignored_by_name(name) is None


def _hashes_in(place: str) -> Iterator[str]:
    for number, line in enumerate(split_lines(local_file(place).read_bytes()), start=1):
        words = line.partition("#")[0].split()  # `sha256sum` writes the name of the file behind the hash
        if words and not _SHA256.fullmatch(words[0]):
            raise ConfigError(
                f"{_FIELD}: {place}, line {number}: {line[:80]!r} does not begin with a SHA-256 of 64 hex digits; "
                "correct it, or give a folder of images or a store"
            )
        if words:
            yield words[0].lower()
