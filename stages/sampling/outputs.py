"""The output folder of a sampling: refusals, captions next to images, the grid."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imagen_core.images import tile, write_png
from imagen_core.sealed import DamagedFileError, read_sealed, sealed
from pipeline.errors import ConfigError, StaleOutputError
from pipeline.fingerprint import differences
from pipeline.storage.files import file_digest, write_text
from stages.checkpoints.load import comparable_origin
from stages.images import read_image
from stages.places import local_file
from stages.sampling.config import InpaintConfig
from stages.sampling.requests import ImageRequest
from stages.sampling.session import SamplingSession

_RECORD = "images.json"


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Where the images are: `images-SIZE/INDEX.png` is image INDEX after the stage of that size."""

    root: Path
    requests: Sequence[ImageRequest]
    """The images of all processes."""
    sizes_px: Sequence[int]
    """Sizes that are written."""

    def path(self, request: ImageRequest, size_px: int) -> Path:
        return self.root / f"images-{size_px}" / request.name

    def missing(self) -> list[ImageRequest]:
        """Images that the folder does not have in all sizes."""
        return [each for each in self.requests if not all(path.exists() for path in self._paths(each))]

    def write_images(self, requests: Sequence[ImageRequest], pixels: Mapping[int, np.ndarray]) -> None:
        """Writes a batch of uint8 (b, h, w, 3) by size; each file appears in full or not at all."""
        for row, request in enumerate(requests):
            for size in self.sizes_px:
                write_png(self.path(request, size), pixels[size][row])

    def write_texts(self, requests: Sequence[ImageRequest]) -> None:
        """Writes each prompt next to its images."""
        for request in requests:
            for path in self._paths(request):
                text, content = path.with_suffix(".txt"), request.prompt + "\n"
                if not text.exists() or text.read_bytes() != content.encode("utf-8", "backslashreplace"):
                    write_text(text, content)

    def write_grid(self) -> None:
        """Writes `grid.png`: the first 64 images of the last stage."""
        shown = [read_image(self.path(request, self.sizes_px[-1])) for request in self.requests[:64]]
        write_png(self.root / "grid.png", tile(shown, columns=math.ceil(math.sqrt(len(shown)))))

    def claim(self, record: Mapping[str, Any], url: str, *, restart: bool, alone: bool) -> None:
        """Writes `images.json` and makes the folders; with `restart` deletes images of other settings.

        Args:
            record: from `sampling_record`.
            url: names the folder in messages.
            alone: whether this is the only process that samples into the folder.
        Raises:
            StaleOutputError: the folder holds images of other settings.
        """
        path = self.root / _RECORD
        changes = _changes(path, record) if any(self.root.glob("images-*/*.png")) else []
        if changes and not (restart and alone):
            remedy = "use another --out, or --restart to sample again"
            remedy += "" if alone else " (in one process, at first)"
            raise StaleOutputError(f"{url}: holds images of other settings: {'; '.join(changes[:5])}; {remedy}")
        if changes:
            for file in self.root.glob("images-*/*"):
                file.unlink()
        write_text(path, sealed(record).decode())
        for size in self.sizes_px:
            (self.root / f"images-{size}").mkdir(exist_ok=True)

    def remove_damaged(self, requests: Sequence[ImageRequest]) -> int:
        """Removes images that cannot be read, so that they are generated again; returns their number."""
        paths = (path for request in requests for path in self._paths(request))
        damaged = [path for path in paths if path.exists() and not _is_png(path)]
        for path in damaged:
            path.unlink()
        return len(damaged)

    def _paths(self, request: ImageRequest) -> Iterator[Path]:
        return (self.path(request, size) for size in self.sizes_px)


def sampling_record(
    settings: Mapping[str, object],
    session: SamplingSession,
    requests: Sequence[ImageRequest],
    inpaint: InpaintConfig | None,
) -> dict[str, Any]:
    """Everything that decides the images: `settings`, checkpoints, images that are read, prompts and seeds.

    Raises:
        ConfigError: an image to read is missing.
    """
    reads_text, reads_labels = session.cascade.max_characters is not None, session.cascade.num_classes is not None
    return {
        "settings": settings,
        "stages": session.origins,
        "sources": _digests(requests, inpaint),
        "images": [
            {"file": each.name, "prompt": each.prompt, "seed": each.seed, "key": each.caption.key}
            | ({"transcription": each.transcription} if reads_text else {})
            | ({"label": each.label} if reads_labels else {})
            | ({} if each.shape is None else {"size": list(session.cascade.shapes(each.shape)[-1])})
            for each in requests
        ],
    }


def _changes(path: Path, record: Mapping[str, Any]) -> list[str]:
    """What differs from the record of the images that are there."""
    try:
        previous = read_sealed(path)
        if "stages" in record:
            pairs = zip_longest(record["stages"], previous.get("stages", ()))
            record = {**record, "stages": [comparable_origin(*pair) for pair in pairs]}
        return differences(_by_file(previous), _by_file(record))
    except FileNotFoundError:
        return [f"{path.name} is missing, so nothing says how they were made"]
    except (DamagedFileError, TypeError, KeyError, AttributeError) as error:
        return [f"{error}, so nothing says how they were made"]


def _is_png(path: Path) -> bool:
    """Whether all checksums of an image are right."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _by_file(record: Mapping[str, Any]) -> dict[str, object]:
    """The record with a mapping of images, whose differences are lines about single images."""
    images = record.get("images", ())
    return {**record, "images": {image["file"]: image for image in images}}


def _digests(requests: Sequence[ImageRequest], inpaint: InpaintConfig | None) -> dict[str, str]:
    """SHA-256 of each image that is read, by its path."""
    paths = {path for request in requests for path in request.paths}
    if inpaint is not None:
        paths |= {inpaint.image, inpaint.mask}
    try:
        return {path: file_digest(local_file(path)) for path in sorted(paths)}
    except OSError as error:
        raise ConfigError(
            f"{error.filename or error}: cannot be read as an image ({error.strerror}); check the path"
        ) from error
