"""The images of a sampling, or of the samplings of an evaluation, by prompt."""

import math
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pipeline.errors import ConfigError
from pipeline.storage import Storage
from pipeline.storage.open import open_storage

_RECORD = "images.json"
_SIZE = re.compile(r"images-(\d{1,6})", re.ASCII)
_FILE = re.compile(r"\d{1,12}\.png", re.ASCII)
"""The only names that are read: a record comes from a folder that anybody may have written."""
_SET = re.compile(r"generated|(?:sigma_rel|guidance|autoguidance)-[-+.\w]{1,80}", re.ASCII)
_KNOWN_S = 10.0
_WEIGHT = re.compile(r"guidance-(.+)")


@dataclass(frozen=True, slots=True)
class SampledImage:
    """An image of a record; `index` is its place in it."""

    index: int
    file: str
    prompt: str
    seed: int | None
    key: str | None
    transcription: str | None
    label: int | None

    @property
    def about(self) -> str:
        """What decided it besides the prompt."""
        shown = {"seed": self.seed, "label": self.label, "text in the image": self.transcription, "key": self.key}
        return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


@dataclass(frozen=True, slots=True)
class ImageSet:
    """The images of one sampling; `name` is "" or that of its folder, `sizes_px` rise."""

    name: str
    sizes_px: tuple[int, ...]
    images: tuple[SampledImage, ...]

    def file(self, index: int, size_px: int) -> str | None:
        """Name of an image's file in the place; None if there is no such image or size."""
        if size_px not in self.sizes_px or not 0 <= index < len(self.images):
            return None
        return f"{self.name}/".lstrip("/") + f"images-{size_px}/{self.images[index].file}"


@dataclass(frozen=True, slots=True)
class Column:
    """What is shown next to each other: a set (by its place in the list of sets) at a size."""

    number: int
    size_px: int
    title: str


@dataclass(frozen=True, slots=True)
class PromptImages:
    """A prompt and its images: the first set's records, which those of the others have in common."""

    prompt: str
    images: tuple[SampledImage, ...]


class ImageSets:
    """The sets of a place. Records are read again when they have changed. May be used from several threads."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._lock = threading.Lock()
        self._records: dict[str, tuple[str, tuple[SampledImage, ...]]] = {}
        self._found: tuple[float, list[ImageSet]] = -math.inf, []

    def all(self) -> list[ImageSet]:
        """The sets: that of the folder itself, or those in it, guidance weights rising.

        Raises:
            ConfigError: a record is damaged.
            PipelineError, OSError: the folder cannot be read.
        """
        names = [
            "",
            *sorted(
                (name for name, is_folder in self._storage.entries() if is_folder and _SET.fullmatch(name)), key=_order
            ),
        ]
        with self._lock:
            found = ((name, self._images(name)) for name in names)
            sets = [ImageSet(name, self._sizes(name), images) for name, images in found if images is not None]
            self._found = time.monotonic(), sets
            return sets

    def file(self, number: int, index: int, size_px: int) -> str | None:
        """Name of the file of an image of a set; None if there is none. The images of a page do not list the folder
        for each: what was found in the last seconds counts.

        Raises:
            ConfigError, PipelineError, OSError: as `all`.
        """
        when, sets = self._found
        if time.monotonic() - when > _KNOWN_S or number >= len(sets):
            sets = self.all()
        return sets[number].file(index, size_px) if number < len(sets) else None

    def _images(self, name: str) -> tuple[SampledImage, ...] | None:
        record = f"{name}/{_RECORD}".lstrip("/")
        version = self._storage.version(record)
        if version is None:
            return None
        known = self._records.get(name)
        if known is None or known[0] != version:
            value = self._storage.read_json(record, "sample again with --restart")
            self._records[name] = known = version, _images(value, f"{self._storage.url}/{record}")
        return known[1]

    def _sizes(self, name: str) -> tuple[int, ...]:
        folder = open_storage(f"{self._storage.url}/{name}") if name else self._storage
        sizes = (_SIZE.fullmatch(entry) for entry, is_folder in folder.entries() if is_folder)
        return tuple(sorted(int(match[1]) for match in sizes if match))


def columns_of(sets: Sequence[ImageSet], size_px: int | None) -> list[Column]:
    """What to show next to each other.

    Args:
        size_px: this size of each set; None: of one set all sizes, of several the largest of each.
    """
    columns = []
    for number, each in enumerate(sets):
        sizes = [size for size in each.sizes_px if size_px in (None, size)]
        if len(sets) > 1 and size_px is None:
            sizes = sizes[-1:]
        name = each.name.replace("guidance-", "guidance ")
        columns += [Column(number, size, f"{name}, {size} px" if len(sets) > 1 else f"{size} px") for size in sizes]
    return columns


def by_prompt(images: Sequence[SampledImage], search: str) -> list[PromptImages]:
    """The prompts that contain a text, upper or lower case, each with its images that follow each other."""
    wanted = search.casefold()
    found = (each for each in images if wanted in each.prompt.casefold())
    return [PromptImages(prompt, tuple(group)) for prompt, group in groupby(found, key=lambda each: each.prompt)]


def _images(record: Any, url: str) -> tuple[SampledImage, ...]:
    images = record.get("images") if isinstance(record, dict) else None
    if not isinstance(images, list):
        raise ConfigError(f"{url}: has no list of images; sample again with --restart")
    return tuple(_image(index, each, url) for index, each in enumerate(images))


def _image(index: int, value: Any, url: str) -> SampledImage:
    file = value.get("file") if isinstance(value, dict) else None
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise ConfigError(f"{url}: image {index} has the file {str(file)[:80]!r}, which no sampling writes; delete it")
    seed, label = (value[name] if isinstance(value.get(name), int) else None for name in ("seed", "label"))
    key, transcription = (
        value[name] if isinstance(value.get(name), str) else None for name in ("key", "transcription")
    )
    return SampledImage(index, file, str(value.get("prompt", "")), seed, key, transcription, label)


def _order(name: str) -> tuple[int, float, str]:
    weight = _WEIGHT.fullmatch(name)
    try:
        return (1, float(weight[1]), name) if weight else (0, 0.0, name)
    except ValueError:
        return 2, 0.0, name
