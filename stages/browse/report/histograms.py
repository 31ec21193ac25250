"""Histograms of a store's captions and images, as bar charts."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from imagen_core.store import Store
from stages.browse.charts import BarChart, Bin, bar_chart

_MOST_SHARDS = 64
_MOST_BARS = 40
_ASPECT_BARS = 32
_WIDEST = 4.0


def spread_shards(store: Store) -> list[int]:
    """Positions of the shards with samples: of all, or of 64 that are spread evenly over the store."""
    positions = np.flatnonzero(store.manifest.rows)
    if len(positions) > _MOST_SHARDS:
        positions = positions[np.linspace(0, len(positions) - 1, _MOST_SHARDS).astype(int)]
    return positions.tolist()


def image_shapes(store: Store) -> np.ndarray:
    """Width and height of the original images, int64 (n, 2): of all samples, or of those of 64 shards that are spread
    evenly over the store. Samples whose size is not known are left out."""
    found = [np.empty((0, 2), np.int64)]
    for position in spread_shards(store):
        table = store.shard(position).columns(("width", "height"))
        sizes = np.stack([table[name].to_numpy() for name in ("width", "height")], axis=1).astype(np.int64)
        rows = np.setdiff1d(np.arange(len(sizes)), list(store.manifest.excluded.get(position, ())))
        found.append(sizes[rows])
    sizes = np.concatenate(found)
    return sizes[sizes.min(axis=1) > 0] if len(sizes) else sizes


def shape_charts(shapes: np.ndarray) -> list[BarChart]:
    """Histograms of aspect ratio, width and height.

    Args:
        shapes: int (n, 2) widths and heights in pixels.
    """
    if not len(shapes):
        return []
    width, height = shapes.T
    charts = [aspect_chart(width / height)]
    return [*charts, count_chart("width, px", width), count_chart("height, px", height)]


def count_chart(title: str, values: Sequence[int] | np.ndarray) -> BarChart:
    """A histogram of whole numbers >= 0: a bar for each number, or for as many numbers as keep it to 40 bars. The last
    bar also has the largest hundredth where these lie far apart."""
    found = np.asarray(values, np.int64)
    if not len(found):
        return bar_chart(title, ())
    low, most = int(found.min()), int(found.max())
    usual = int(np.quantile(found, 0.99, method="higher"))
    high = usual if most - low > 2 * (usual - low) else most
    step = -(-(high - low + 1) // _MOST_BARS)
    starts = list(range(low, high + 1, step))
    counts = np.bincount(np.minimum((found - low) // step, len(starts) - 1), minlength=len(starts)).tolist()
    ends = [start + step - 1 for start in starts[:-1]] + [max(most, starts[-1])]
    bins = [
        Bin(f"{first:,}" if first == last else f"{first:,} to {last:,}", count)
        for first, last, count in zip(starts, ends, counts, strict=True)
    ]
    ticks = dict.fromkeys([f"{low:,}", f"{starts[len(starts) // 2]:,}", f"{most:,}" if most > low else ""])
    return bar_chart(title, bins, [tick for tick in ticks if tick])


def aspect_chart(aspects: np.ndarray) -> BarChart:
    """A histogram of width / height from 1:4 to 4:1 on a log scale; the outer bars also have what lies beyond."""
    edges = np.geomspace(1 / _WIDEST, _WIDEST, _ASPECT_BARS + 1)
    places = np.clip(np.searchsorted(edges, aspects, side="right") - 1, 0, _ASPECT_BARS - 1)
    counts = np.bincount(places, minlength=_ASPECT_BARS).tolist()
    labels = [f"{low:.2f} to {high:.2f}" for low, high in pairwise(edges.tolist())]
    labels[0], labels[-1] = f"less than {edges[1]:.2f}", f"{edges[-2]:.2f} and more"
    bins = [Bin(label, count) for label, count in zip(labels, counts, strict=True)]
    return bar_chart("width / height", bins, ("1:4", "1:2", "1:1", "2:1", "4:1"))
