"""What can be known of an evaluation in seconds, before any image is sampled and any feature is computed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from imagen_core.cascade import Cascade
from pipeline.errors import ConfigError
from stages.evaluation.config import EvaluateConfig, KernelConfig
from stages.evaluation.features.gather import FeatureSet, captions_of, read_set
from stages.evaluation.features.image_sets import AnyImageSet, FeatureFiles, ImageSet
from stages.evaluation.features.inception import InceptionFeatures
from stages.evaluation.metrics import compute_metrics
from stages.sampling.requests import ImageRequest

Opened = ImageSet | FeatureSet
"""Images, or their features if these come from files."""
_FEW = 2000
"""Rows up to which neighbours are found in a moment."""


def opened(name: str, images: AnyImageSet) -> Opened:
    """A set of images, or the features of files.

    Raises:
        ConfigError: a folder, store or file is missing, empty, or cannot be read.
    """
    return read_set(images, name) if isinstance(images, FeatureFiles) else images.open(name)


def expected_images(requests: Sequence[ImageRequest], cascade: Cascade, size_px: int) -> ImageSet:
    """The images that a sampling will make; they cannot be read yet."""
    stage, prompts = cascade.sizes_px.index(size_px), [each.prompt for each in requests]
    sides = [size_px if each.shape is None else min(cascade.shapes(each.shape)[stage]) for each in requests]
    return ImageSet({}, len(requests), _not_yet, lambda: prompts, lambda: iter(sides))


def _not_yet() -> Iterator[np.ndarray]:
    raise AssertionError("these images are not sampled yet")


def check_models(config: EvaluateConfig) -> dict[str, dict[str, object]]:
    """The fingerprints of all models.

    Raises:
        MachineError: a model is missing, or cannot be read.
        ConfigError: it cannot be used with these settings.
    """
    models = (("features", config.features), ("clip", config.clip), ("lpips", config.lpips))
    found = {name: dict(model.fingerprint()) for name, model in models if model is not None}
    if config.clip is not None:
        found["clip"]["captions"] = dict(config.clip.captions.fingerprint())
    if isinstance(config.features, InceptionFeatures):
        config.features.load()
    if config.lpips is not None:
        config.lpips.load()
    return found


def check_sets(
    config: EvaluateConfig, generated: Mapping[str, Opened], reference: Opened | None, originals: ImageSet | None
) -> None:
    """Checks that all metrics can be computed, by computing them from random features of as many images.

    Args:
        originals: what LPIPS compares the generated images with.
    Raises:
        ConfigError: too few images, unequal numbers or sizes, no captions, features of different models.
    """
    for name, images in generated.items():
        if isinstance(images, ImageSet):
            if config.clip is not None:
                captions_of(name, images)
            if originals is not None:
                _check_pairs(name, images, originals)
        sets = [None if each is None else _random(each, config) for each in (images, reference)]
        assert sets[0] is not None
        counts = [len(each.features) for each in sets if each is not None and each.features is not None]
        is_few = max(counts, default=0) <= _FEW or config.num_neighbours >= min(counts)
        update = {"kernel": KernelConfig(num_subsets=1, subset_size=2)} | ({} if is_few else {"num_neighbours": 0})
        compute_metrics(sets[0], sets[1], config.model_copy(update=update))


def _check_pairs(name: str, images: ImageSet, originals: ImageSet) -> None:
    if originals.count != images.count:
        raise ConfigError(
            f"lpips: {images.count} images in {name} and {originals.count} to compare them with; give as many"
        )
    for number, (side, other) in enumerate(zip(images.sides(), originals.sides(), strict=False)):
        if None not in (side, other) and side != other:
            raise ConfigError(
                f"lpips: image {number} is {side} px and the one it is compared with {other} px; give equal sizes"
            )


def _random(images: Opened, config: EvaluateConfig) -> FeatureSet:
    """Features as those of `images` will be, but for their width."""

    def rows(count: int, width: int = 2) -> np.ndarray:
        return np.random.default_rng(0).standard_normal((count, width))

    if isinstance(images, FeatureSet):
        names = ("features", "logits", "clip_images", "clip_texts", "lpips")
        known = {name: value for name in names if (value := getattr(images, name)) is not None}
        arrays: dict[str, Any] = {name: rows(len(value), 1 if name == "lpips" else 2) for name, value in known.items()}
        return FeatureSet(images.label, **arrays, model=images.model)
    model, count = config.features, images.count
    return FeatureSet(
        None if model is None else model.label,
        features=None if model is None else rows(count),
        logits=rows(count) if isinstance(model, InceptionFeatures) else None,
        clip_images=None if config.clip is None else rows(count),
        clip_texts=None if config.clip is None else rows(count),
        lpips=None if config.lpips is None else rows(count, 1),
        model=None if model is None else model.fingerprint(),
    )
