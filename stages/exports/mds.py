"""MDS files for mosaicml-streaming, one folder of them per shard of the store; the names of columns are those of PRX.

`caption`, `caption_1` ..., of a further set `caption_{set}`, `caption_{set}_1` ...; `latent_{caption}_{encoder}`:
float (n_tokens, dim) or (n_tokens, layers, dim); `attention_mask_{caption}_{encoder}`: uint8 (max_tokens,), 1 for each
token and then 0; `image`: the largest images, `image_64` others; `original_width`, `original_height`, `key`, `url`,
`sha256`, `num_captions`, `metadata` (JSON), `image_embed_{encoder}`, `array_{name}`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagen_core.store import EmbeddingGroup
from stages.exports.mds_files import write_files
from stages.exports.samples import ExportSample
from stages.exports.selection import Selection
from stages.exports.values import fields_of

_IN_OTHER_COLUMNS = ("key", "captions", "caption_sets", "url", "sha256", "width", "height")


def write_mds(
    folder: Path, samples: Iterable[ExportSample], selection: Selection, num_captions: Mapping[str | None, int]
) -> int:
    """Writes MDS files and their index into a folder; returns the number of samples.

    Args:
        num_captions: captions that all samples have columns for, by further set and under None of the first; of each
            set at least one. A sample with fewer has empty texts, one row of NaN, and a mask of zeros in the place of
            the others, and one of a further set that was not encoded has such a row and mask: PRX leaves those out.
    """
    values = (_values(sample, selection, num_captions) for sample in samples)
    return write_files(folder, _columns(selection, num_captions), values)


def _caption_names(caption_set: str | None, num_captions: int) -> list[str]:
    first = "caption" if caption_set is None else f"caption_{caption_set}"
    return [f"{first}_{number}" if number else first for number in range(max(num_captions, 1))]


def _columns(selection: Selection, num_captions: Mapping[str | None, int]) -> dict[str, str]:
    """Encoding of each column."""
    columns: dict[str, str] = dict.fromkeys(("key", "url", "sha256"), "str")
    columns |= dict.fromkeys(("original_width", "original_height", "num_captions"), "int")
    columns["metadata"] = "json"
    for size, group in selection.images.items():
        columns[selection.image_name(size, "image")] = selection.image_codec(group)
    for caption_set, number in num_captions.items():
        encoders = selection.texts if caption_set is None else selection.encoders_of(caption_set)
        for caption in _caption_names(caption_set, number):
            columns[caption] = "str"
            for encoder in encoders:
                columns[f"latent_{caption}_{encoder}"] = "ndarray"
                columns[f"attention_mask_{caption}_{encoder}"] = "ndarray"
    columns |= {f"image_embed_{encoder}": "ndarray" for encoder in selection.image_embeds}
    return columns | {f"array_{name}": "ndarray" for name in selection.arrays}


def _values(sample: ExportSample, selection: Selection, num_captions: Mapping[str | None, int]) -> dict[str, Any]:
    row = sample.row
    values: dict[str, Any] = {
        "key": row.key,
        "url": row.url or "",
        "sha256": row.sha256,
        "original_width": row.width,
        "original_height": row.height,
        "num_captions": len(row.captions),
        "metadata": {name: value for name, value in fields_of(sample).items() if name not in _IN_OTHER_COLUMNS},
    }
    for size, data in sample.images.items():
        values[selection.image_name(size, "image")] = data  # bytes are written as they are
    for caption_set, wanted in num_captions.items():
        captions, texts = _of_set(sample, selection, caption_set)
        for number, caption in enumerate(_caption_names(caption_set, wanted)):
            values[caption] = captions[number] if number < len(captions) else ""
            for encoder, (group, rows) in texts.items():
                is_there = number < len(rows) and len(rows[number]) > 0
                blank = np.full((1, *group.token_shape), np.nan, selection.float_dtype(group))
                latent = rows[number] if is_there else blank
                values[f"latent_{caption}_{encoder}"] = latent
                values[f"attention_mask_{caption}_{encoder}"] = _mask(group, len(latent), is_there=is_there)
    values |= {f"image_embed_{encoder}": embedding for encoder, embedding in sample.image_embeds.items()}
    return values | {f"array_{name}": _array(array) for name, array in sample.arrays.items()}


def _of_set(
    sample: ExportSample, selection: Selection, caption_set: str | None
) -> tuple[Sequence[str], dict[str, tuple[EmbeddingGroup, list[np.ndarray]]]]:
    """The captions of a set, and their embeddings by encoder."""
    if caption_set is None:
        return sample.row.captions, {name: (group, sample.text[name]) for name, group in selection.texts.items()}
    return sample.caption_sets[caption_set], {
        encoder: (group, sample.set_text[encoder, name])
        for (encoder, name), group in selection.set_texts.items()
        if name == caption_set
    }


def _mask(group: EmbeddingGroup, num_tokens: int, *, is_there: bool) -> np.ndarray:
    """uint8 (max_tokens,); as long as there are tokens where the encoder has no such limit."""
    limit = group.fingerprint.get("max_tokens")
    mask = np.zeros(max(num_tokens, limit if isinstance(limit, int) else 0), np.uint8)
    mask[: num_tokens * is_there] = 1
    return mask


def _array(array: np.ndarray) -> np.ndarray:
    """MDS has neither bool nor arrays without axes."""
    return np.atleast_1d(array.astype(np.uint8) if array.dtype == np.bool_ else array)
