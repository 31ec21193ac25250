"""Height and width of the images to generate, where they are not square."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from imagen_core.cascade import Cascade
from imagen_core.diffusion.shapes import low_res_shape
from imagen_core.store import Store
from imagen_core.store.buckets import DEFAULT_MAX_RATIO, Shape, bucket_shapes, choose_shape
from pipeline.errors import ConfigError
from stages.sampling.caption_sets import store_of
from stages.sampling.config import RequestConfig
from stages.sampling.requests import ImageRequest

log = logging.getLogger(__name__)


def with_shapes(requests: Sequence[ImageRequest], config: RequestConfig, cascade: Cascade) -> list[ImageRequest]:
    """The requests with the shapes that `size`, `aspect`, or the samples of their captions ask for.

    Raises:
        ConfigError: a shape that the cascade cannot generate.
    """
    first_px, store = cascade.sizes_px[0], store_of(config.captions)
    if config.size is not None:
        factor = Fraction(first_px, cascade.sizes_px[-1])
        height, width = (side * factor for side in config.size)
        if height.denominator != 1 or width.denominator != 1:
            raise ConfigError(
                f"size: {list(config.size)} is no whole number of pixels in the first stage ({float(height):g} x "
                f"{float(width):g}); take multiples of {factor.denominator}"
            )
        return _shaped(requests, [(int(height), int(width))] * len(requests), cascade, "size")
    if config.aspect is not None:
        given = [config.aspect] if isinstance(config.aspect, str) else config.aspect
        of_prompt = [_nearest(aspect, cascade) for aspect in given]
        shapes = [of_prompt[each.index // config.num_images_per_prompt % len(given)] for each in requests]
        return _shaped(requests, shapes, cascade, "aspect")
    if store is None or not any(group.shapes for group in store.manifest.images.values()):
        return list(requests)
    own = _sample_shapes(requests, store, first_px)
    return _shaped(requests, own, cascade, "captions.path")


def _nearest(aspect: str, cascade: Cascade) -> Shape:
    """The shape of the first stage's area that is nearest to an aspect such as `3:2`: of those that it was trained on,
    if they are known and there are ones on both sides of it."""
    width, height = (Fraction(part) for part in aspect.split(":"))
    ratio, size_px = width / height, cascade.sizes_px[0]
    if ratio == 1:
        return size_px, size_px
    candidates: Sequence[Shape] = cascade.stages[0].trained_shapes
    ratios = [Fraction(columns, rows) for rows, columns in candidates]
    if not ratios or not min(ratios) <= ratio <= max(ratios):
        try:
            candidates = bucket_shapes(size_px, max(DEFAULT_MAX_RATIO, float(ratio), float(1 / ratio)))
        except ValueError as error:
            raise ConfigError(f"aspect: {aspect}: {error}; give `size`") from error
    fitting = [shape for shape in candidates if _fits(shape, cascade)]
    return choose_shape(ratio.numerator, ratio.denominator, fitting or candidates)


def _fits(shape: Shape, cascade: Cascade) -> bool:
    try:
        cascade.shapes(shape)
    except ValueError:
        return False
    return True


def _sample_shapes(requests: Sequence[ImageRequest], store: Store, first_px: int) -> list[Shape]:
    """The shapes that the images of the captions' samples have in the store, or would have in this size."""
    group = store.manifest.images.get(first_px)
    if group is not None and group.shapes:
        shapes: Sequence[Shape] = group.shapes
    else:
        shapes = bucket_shapes(first_px)
    found: list[Shape] = []
    for request in requests:
        assert request.caption.original is not None
        found.append(choose_shape(*request.caption.original, shapes))
    return found


def _shaped(
    requests: Sequence[ImageRequest], shapes: Sequence[Shape], cascade: Cascade, field: str
) -> list[ImageRequest]:
    for shape in dict.fromkeys(shapes):
        try:
            cascade.shapes(shape)
            low_res_shape(cascade.stages[0].config, shape)
        except ValueError as error:
            raise ConfigError(f"{field}: {error}; take another shape") from error
    _warn_of_untrained(dict.fromkeys(shapes), cascade)
    square = (cascade.sizes_px[0],) * 2
    return [
        request if shape == square else replace(request, shape=shape)
        for request, shape in zip(requests, shapes, strict=True)
    ]


def _warn_of_untrained(shapes: Iterable[Shape], cascade: Cascade) -> None:
    """Warns of shapes that a stage was not trained on, if those are known, and it was not trained on crops."""
    by_stage = zip(cascade.stages, zip(*map(cascade.shapes, shapes), strict=True), strict=False)
    for stage, wanted in by_stage:
        trained, square = stage.trained_shapes, (stage.size_px, stage.size_px)
        if square in trained and (others := [shape for shape in wanted if shape not in trained]):
            log.warning(
                "the %d px stage was trained on images of %s px (height x width), not of %s, which may be worse",
                stage.size_px,
                _listed(trained),
                _listed(others),
            )


def _listed(shapes: Iterable[Shape]) -> str:
    return ", ".join(f"{height} x {width}" for height, width in shapes)


def batches_of(requests: Sequence[ImageRequest], batch_size: int) -> Iterator[list[ImageRequest]]:
    """Batches of images of one shape each."""
    by_shape: dict[Shape | None, list[ImageRequest]] = {}
    for request in requests:
        by_shape.setdefault(request.shape, []).append(request)
    for group in by_shape.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
