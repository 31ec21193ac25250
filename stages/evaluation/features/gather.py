"""The features that metrics are computed from: extracted once, and kept in the run folder."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from glob import escape
from pathlib import Path

import numpy as np

from imagen_core.evaluation import Moments
from imagen_core.sealed import DamagedFileError
from pipeline.errors import ConfigError
from pipeline.fingerprint import digest
from stages.evaluation.features.base import Extracted, FeatureModel, Named, environment
from stages.evaluation.features.clip import ClipFeatures
from stages.evaluation.features.files import read_extracted, read_features, write_features
from stages.evaluation.features.image_sets import FeatureFiles, ImageSet
from stages.evaluation.features.lpips import LpipsDistance

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureSet:
    """Features with one row per image, all of the same images; None where they are not known."""

    label: str | None
    """The model that extracted `features`."""
    features: np.ndarray | None = None
    logits: np.ndarray | None = None
    clip_images: np.ndarray | None = None
    clip_texts: np.ndarray | None = None
    lpips: np.ndarray | None = None
    """(n, 1), the distance of each image to the one it should look like."""
    counts: dict[str, int] = field(default_factory=dict)
    """Counts to report with the metrics."""
    model: Mapping[str, object] | None = None
    """The fingerprint of the model that extracted `features`, if it is known."""

    @cached_property
    def moments(self) -> Moments:
        """Of `features`, which must be known."""
        assert self.features is not None
        return Moments.of(self.features)


class FeatureCache:
    """Features in a folder, one file per set of images and model.

    A file is used again only for the same images or captions in the same order, the same fingerprint of the model, and
    the same `environment`. Once its successor is there, an earlier file of the same name and model is removed.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def get(self, name: str, inputs: object, model: Named, extract: Callable[[], Extracted]) -> Extracted:
        """The result of `extract`, from the file if it is already there for the same inputs and model."""
        stem = f"{name}-{digest(model.fingerprint())[:8]}"
        key = digest({"inputs": inputs, "model": model.fingerprint(), "environment": environment()})
        path = self._folder / f"{stem}-{key[:16]}.safetensors"
        if path.exists():
            try:
                return read_extracted(path)
            except DamagedFileError as error:
                log.warning("%s; it is made again", error)
        extracted = extract()
        write_features(path, extracted, model)
        for previous in self._folder.glob(f"{escape(stem)}-*.safetensors"):
            if previous != path:
                previous.unlink()
        return extracted


def gather(
    name: str,
    images: ImageSet,
    model: FeatureModel | None,
    clip: ClipFeatures | None,
    cache: FeatureCache,
    *,
    lpips: LpipsDistance | None = None,
    originals: ImageSet | None = None,
) -> FeatureSet:
    """Features by `model`, both halves of the CLIP score by `clip`, and distances to `originals` by `lpips`.

    Raises:
        MachineError: a model cannot be found or read.
        ConfigError: an image cannot be read, or there are no captions for `clip`.
    """

    def extract(model: FeatureModel) -> Extracted:
        return cache.get(name, images.identity, model, lambda: model.extract(images.read()))

    extracted = Extracted({}) if model is None else extract(model)
    image_features, texts = None, Extracted({})
    if clip is not None:
        captions = captions_of(name, images)
        image_features = extract(clip).arrays["features"]
        texts = cache.get("captions", captions, clip.captions, lambda: clip.captions.extract(captions))
    distances = None
    if lpips is not None and originals is not None:
        pair = [images.identity, originals.identity]
        found = cache.get(name, pair, lpips, lambda: lpips.distances(images.read(), originals.read()))
        distances = found.arrays["features"]
    return FeatureSet(
        None if model is None else model.label,
        extracted.arrays.get("features"),
        extracted.arrays.get("logits"),
        image_features,
        texts.arrays.get("features"),
        distances,
        {**extracted.counts, **texts.counts},
        None if model is None else model.fingerprint(),
    )


def captions_of(name: str, images: ImageSet) -> Sequence[str]:
    """The captions that the CLIP score needs.

    Raises:
        ConfigError: there are none.
    """
    captions = images.captions()
    if captions is None:
        raise ConfigError(
            f"clip: the CLIP score needs captions, and {name} has none; give INDEX.txt files, or clip=null"
        )
    return captions


def read_set(files: FeatureFiles, name: str) -> FeatureSet:
    """Features from files.

    Raises:
        ConfigError: a file cannot be read.
    """
    found = {
        key: None if path is None else read_features(path, f"{name}.{key}")
        for key, path in (
            ("path", files.path),
            ("logits", files.logits),
            ("clip_images", files.clip_images),
            ("clip_texts", files.clip_texts),
        )
    }
    features, rows = found["path"], {key: None if file is None else file.rows for key, file in found.items()}
    counts = {key: len(values) for key, values in rows.items() if values is not None}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"{name}: files of different images, with {counts} rows; give each the same rows")
    label = files.model or (None if features is None else features.label)
    model = None if features is None or files.model else features.model
    return FeatureSet(label, rows["path"], rows["logits"], rows["clip_images"], rows["clip_texts"], model=model)
