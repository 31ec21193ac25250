"""The report's images: samples as inline PNG, and the caption-length histogram as inline SVG."""

import base64
import io
from collections.abc import Sequence

import numpy as np

from imagen_core.store import Store
from stages.figures import svg

_MAX_COUNTED_CAPTIONS = 4096
_SHOWN_PX = 256


def image_grid(store: Store, count: int) -> list[dict[str, object]]:
    """Up to `count` samples spread evenly over the store: captions, kept columns, and every size as a data URL,
    uncropped."""
    indices = np.linspace(0, len(store) - 1, min(count, len(store))).astype(int) if len(store) else []
    samples = (store[int(index)] for index in indices)
    further = list(store.caption_sets)[1:]
    return [
        {
            "key": sample.key,
            "captions": [
                *sample.captions,
                *(f"{name}: {caption}" for name in further for caption in sample.caption_sets[name]),
            ],
            "columns": sample.columns,
            "images": [
                {"width_px": width, "height_px": height, "url": _png_url(sample.images[size])}
                for size in store.image_sizes
                if size <= _SHOWN_PX or size == min(store.image_sizes)
                for height, width in [sample.images[size].shape[:2]]
            ],
        }
        for sample in samples
    ]


def caption_tokens(store: Store, encoder: str, caption_set: str) -> list[int]:
    """Token counts of captions of a set, from up to some thousands of samples in random order; those without one have
    a caption of the first set."""
    counts: list[int] = []
    for batch in store.loader(batch_size=64, text=encoder, max_tokens=None, seed=0, caption_sets={caption_set: 1.0}):
        counts += batch["text_mask"].sum(dim=1).tolist()
        if len(counts) >= _MAX_COUNTED_CAPTIONS:
            break
    return counts


def caption_histogram(counts: Sequence[int]) -> str:
    """Histogram of tokens per caption, as an SVG element."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.4), layout="constrained")
    axes = figure.subplots()
    edges = np.arange(0, max(counts, default=1) + 2) - 0.5
    axes.hist(counts, bins=edges if len(edges) < 80 else 60, color="#3b6ea5")  # pyright: ignore[reportArgumentType]
    axes.set_xlabel("tokens per caption, end of sequence included")
    axes.set_ylabel("captions")
    axes.spines[["top", "right"]].set_visible(False)
    file = svg(figure)
    return file[file.index("<svg") :]


def _png_url(pixels: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
