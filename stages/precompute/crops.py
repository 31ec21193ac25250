"""What stored images do not show of their originals, and how many images are in each aspect-ratio bucket."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import numpy as np

from imagen_core.store import Shape, choose_buckets

_IMAGES, _SQUARE, _BUCKETS = "measured_images", "cropped_by_squares_sum", "cropped_by_buckets_sum"
_BUCKET = "bucket_"
_SHOWN_BUCKETS = 12


class Crops(TypedDict, total=False):
    """Means over images."""

    images: int
    """How many had a width and a height."""
    square: float
    """Part of an original that its centre square lacks, 0 to 1."""
    buckets: float
    """Part that the image of its bucket lacks; only where there are buckets."""
    histogram: dict[str, int]
    """Images by the bucket's shape, as `WIDTHxHEIGHT` of the smallest size, from the tallest; only where images are
    stored in buckets."""


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


def crops_of(counters: Mapping[str, float]) -> Crops:
    """The means and the histogram, from the counters of one or more shards; empty for those of earlier versions."""
    images = int(counters.get(_IMAGES, 0))
    if not images:
        return {}
    found = Crops(images=images, square=counters[_SQUARE] / images)
    if _BUCKETS in counters:
        found["buckets"] = counters[_BUCKETS] / images
    names = {name.removeprefix(_BUCKET): int(n) for name, n in counters.items() if name.startswith(_BUCKET)}
    if names:
        found["histogram"] = dict(sorted(names.items(), key=lambda item: _ratio(item[0])))
    return found


def _ratio(shape: str) -> float:
    width, _, height = shape.partition("x")
    return int(width) / int(height)


def crops_line(crops: Crops) -> str:
    """As text."""
    square, buckets = f"{crops['square']:.1%}", f"{crops.get('buckets', 0):.1%}"
    if "histogram" not in crops:
        would = f"; images.aspect=buckets would cut off {buckets}" if "buckets" in crops else ""
        return f"squares cut off {square} of an image on average{would}"
    return f"{buckets} of an image is cut off on average, by squares it would be {square}; {_shares(crops)}"


def _shares(crops: Crops) -> str:
    histogram, images = crops["histogram"], crops["images"]
    most = sorted(histogram, key=lambda name: -histogram[name])[:_SHOWN_BUCKETS]
    shown = [f"{name} {histogram[name] / images:.1%}" for name in histogram if name in most]
    return ", ".join([*shown, *(["others"] if len(histogram) > len(most) else [])])


def measured(sizes: Iterable[tuple[int, int]], shapes: Sequence[Shape], *, stored: bool) -> Crops:
    """The same straight from sizes."""
    return crops_of(crop_counters(list(sizes), shapes, stored=stored))
