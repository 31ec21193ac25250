"""The report's images as inline PNG, and the lengths of captions."""

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from imagen_core.store import Store
from pipeline.storage.run_folder import RunFolder
from stages.browse.run.staged import StagedOriginals
from stages.images import ImageRejected, decode_rgb

_MAX_COUNTED_CAPTIONS = 4096
_SHOWN_PX = 256
_MOST_THUMBNAILS, _THUMBNAIL_PX = 48, 96
_MOST_PIXELS = 32 * 2**20


def image_grid(store: Store, count: int) -> list[dict[str, Any]]:
    """Up to `count` samples spread evenly over the store: captions, also by set, kept columns, and every size as a
    data URL, uncropped."""
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
            "caption_sets": sample.caption_sets,
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


def dropped_images(run: RunFolder, drops: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], str]:
    """Thumbnails of dropped rows as data URLs, by shard and row: of up to 48 images whose bytes are still in the run
    folder and can be decoded.

    Args:
        drops: as `first_drops` gives them.
    Raises:
        OSError, ValueError, KeyError: a file of originals is damaged.
    """
    staged, found = StagedOriginals(run), {}
    for shard, row in ((drop["shard"], drop["row"]) for drop in drops):
        image = staged.image(shard, row) if len(found) < _MOST_THUMBNAILS else None
        if image is not None:
            with suppress(ImageRejected):
                found[shard, row] = _thumbnail_url(decode_rgb(image[0], max_pixels=_MOST_PIXELS).pixels)
    return found


def _thumbnail_url(pixels: np.ndarray) -> str:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return _png_url(np.asarray(image))


def _png_url(pixels: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
