"""What stored images do not show of their originals, and how many images are in each aspect-ratio bucket."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from imagen_core.store import Shape, choose_buckets

_IMAGES, _SQUARE, _BUCKETS = "measured_images", "cropped_by_squares_sum", "cropped_by_buckets_sum"
_BUCKET = "bucket_"
_SHOWN_BUCKETS = 12


@dataclass(frozen=True)
class Crops:
    """Means over images."""

    images: int
    """How many had a width and a height."""
    square: float
    """Part of an original that its centre square lacks, 0 to 1."""
    buckets: float | None = None
    """Part that the image of its bucket lacks, or would lack; None where there are no buckets."""
    histogram: dict[str, int] | None = None
    """Images by the bucket's shape, as `WIDTHxHEIGHT` of the smallest size, from the tallest; None where images are
    squares."""

    def to_json(self) -> dict[str, Any]:
        """What is known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def crop_counters(sizes: Sequence[tuple[int, int]], shapes: Sequence[Shape], *, stored: bool) -> dict[str, float]:
    """Sums and counts, so that shards can be merged; empty without images.

    Args:
        sizes: width and height of each original in pixels; (0, 0) where there is none.
        shapes: height and width of each bucket; none where there are no buckets.
        stored: whether images are stored in these buckets; else they are what buckets would be.
    """
    widths, heights = np.array([size for size in sizes if min(size) > 0], np.int64).reshape(-1, 2).T
    if not widths.size:
        return {}
    lost = 1 - np.minimum(widths, heights) / np.maximum(widths, heights)
    counters: dict[str, float] = {_IMAGES: int(widths.size), _SQUARE: float(lost.sum())}
    if shapes:
        buckets = choose_buckets(widths, heights, shapes)
        wanted = np.array([width / height for height, width in shapes])[buckets]
        ratios = widths / heights
        counters[_BUCKETS] = float((1 - np.minimum(ratios, wanted) / np.maximum(ratios, wanted)).sum())
        numbers = np.bincount(buckets, minlength=len(shapes)).tolist() if stored else []
        pairs = zip(shapes, numbers, strict=False)
        counters |= {f"{_BUCKET}{width}x{height}": number for (height, width), number in pairs if number}
    return counters


def crops_of(counters: Mapping[str, float]) -> Crops | None:
    """The means and the histogram, from the counters of one or more shards; None for those of earlier versions."""
    images = int(counters.get(_IMAGES, 0))
    if not images:
        return None
    named = {name.removeprefix(_BUCKET): int(n) for name, n in counters.items() if name.startswith(_BUCKET)}
    buckets = counters[_BUCKETS] / images if _BUCKETS in counters else None
    histogram = dict(sorted(named.items(), key=lambda item: _ratio(item[0])))
    return Crops(images, counters[_SQUARE] / images, buckets, histogram or None)


def _ratio(shape: str) -> float:
    width, _, height = shape.partition("x")
    return int(width) / int(height)


def crops_line(crops: Crops) -> str:
    """As text."""
    buckets = "" if crops.buckets is None else f"{crops.buckets:.1%}"
    if crops.histogram is None:
        would = f"; images.aspect=buckets would cut off {buckets}" if buckets else ""
        return f"squares cut off {crops.square:.1%} of an image on average{would}"
    shares = _shares(crops.histogram, crops.images)
    return f"{buckets} of an image is cut off on average, by squares it would be {crops.square:.1%}; {shares}"


def _shares(histogram: Mapping[str, int], images: int) -> str:
    most = sorted(histogram, key=lambda name: -histogram[name])[:_SHOWN_BUCKETS]
    shown = [f"{name} {histogram[name] / images:.1%}" for name in histogram if name in most]
    return ", ".join([*shown, *(["others"] if len(histogram) > len(most) else [])])


def measured(sizes: Iterable[tuple[int, int]], shapes: Sequence[Shape], *, stored: bool) -> Crops | None:
    """The same straight from sizes."""
    return crops_of(crop_counters(list(sizes), shapes, stored=stored))
