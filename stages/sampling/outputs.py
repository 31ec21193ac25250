"""The output folder of a sampling: refusals, captions beside images, the grid."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_core.images import read_image, tile, write_png
from pipeline.errors import ConfigError, StaleOutputError
from pipeline.fingerprint import differences
from pipeline.storage.files import file_digest, read_json, write_json, write_text
from stages.sampling.config import SampleConfig
from stages.sampling.requests import ImageRequest
from stages.sampling.session import SamplingSession

_CHANGES_NOTHING = {
    *("batch_size", "device", "encoder_model", "part", "save_all_sizes", "save_text"),
    *("captions", "transcriptions", "labels"),  # the texts and numbers themselves are recorded
}


def _check_folder(root: Path, url: str, session: SamplingSession, *, restart: bool, alone: bool) -> None:
    """Refuses a folder with images of other settings; with --restart removes them."""
    record = {
        "settings": session.config.model_dump(mode="json", exclude=_CHANGES_NOTHING),
        "stages": session.origins,
        "sources": _digests(session.config),
        "images": [
            {"file": p.name, "prompt": p.prompt, "seed": p.seed, "key": p.caption.key}
            | ({} if session.cascade.max_characters is None else {"transcription": p.transcription})
            | ({} if session.cascade.num_classes is None else {"label": p.label})
            for p in session.images
        ],
    }
    path = root / "images.json"
    drawn = any(root.glob("images-*/*.png"))
    former = read_json(path) if drawn else None
    changes = [] if former is None else differences(_by_file(former), _by_file(record))
    if changes and not (restart and alone):
        remedy = "use another --out, or --restart to draw them anew" + ("" if alone else " (in one process, at first)")
        raise StaleOutputError(f"{url}: holds images of other settings: {'; '.join(changes[:5])}; {remedy}")
    if changes:
        for file in root.glob("images-*/*"):
            file.unlink()
    write_json(path, record)


def _by_file(record: Mapping[str, Any]) -> dict[str, object]:
    """The record with a mapping of images, whose differences are lines about single images."""
    return {**record, "images": {image["file"]: image for image in record["images"]}}


def _write_texts(root: Path, session: SamplingSession, images: Sequence[ImageRequest]) -> None:
    for image in images:
        for _, path in session.files(root, image):
            if not path.with_suffix(".txt").exists():
                write_text(path.with_suffix(".txt"), image.prompt + "\n")


def _digests(config: SampleConfig) -> dict[str, str]:
    """SHA-256 of each image that is read, by its path."""
    single = (config.inpaint_image, config.inpaint_mask)
    paths = {*config.low_res, *config.init_image, *(path for path in single if path is not None)}
    try:
        return {path: file_digest(Path(path)) for path in sorted(paths)}
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: cannot be read as an image ({error.strerror}); check the path"
        ) from error


def _write_grid(root: Path, images: Sequence[ImageRequest], size: int) -> None:
    shown = [read_image(root / f"images-{size}" / image.name) for image in images[:64]]
    write_png(root / "grid.png", tile(shown, columns=math.ceil(math.sqrt(len(shown)))))
