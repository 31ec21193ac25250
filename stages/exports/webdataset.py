"""Tars for webdataset, one per shard of the store.

Sample `SSSSS-RRRRRR` (index of the shard, row there) has `txt` (the first caption), `json` (all fields), `png` or
`jpg` (the largest images; `64.png` others), `text-t5.0.npy` (the embedding of the first caption),
`image-embed-clip.npy` and `array-mask.npy`; `text-t5-short.0.npy` is that of the first caption of the further set
`short`. Names of members are lower case, as webdataset reads them.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from imagen_core.store import array_group, image_embed_group, text_group
from pipeline.errors import ConfigError
from stages.exports.samples import ExportSample
from stages.exports.selection import Selection
from stages.exports.values import fields_of
from stages.precompute.originals import load_tar_writer

SUFFIXES = {"png": "png", "jpeg": "jpg"}


def check_names(selection: Selection) -> None:
    """Raises ConfigError if two names are one in lower case."""
    names = [
        group.name
        for groups in (selection.texts, selection.set_texts, selection.image_embeds, selection.arrays)
        for group in groups.values()
    ]
    lower = [name.lower() for name in names]
    for name in names:
        if lower.count(name.lower()) > 1:
            raise ConfigError(
                f"encoders: another name differs from {name} in case only, which webdataset does not tell apart; "
                "choose one with --encoder"
            )


def write_tar(path: Path, samples: Iterable[ExportSample], selection: Selection) -> int:
    """Writes the tar; returns the number of samples."""
    count = 0
    with path.open("wb") as file:
        tar = load_tar_writer()(file, mtime=0, encoder=False)
        for sample in samples:
            tar.write({"__key__": "{:05d}-{:06d}".format(*sample.place), **_members(sample, selection)})
            count += 1
        tar.close()
    return count


def _members(sample: ExportSample, selection: Selection) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for size, data in sample.images.items():
        suffix = SUFFIXES[selection.image_codec(selection.images[size])]
        largest = size == next(iter(selection.images))
        members[suffix if largest else f"{size}.{suffix}"] = data
    members["txt"] = sample.row.captions[0].encode()
    members["json"] = json.dumps(fields_of(sample), ensure_ascii=False).encode()
    texts = {text_group(name): rows for name, rows in sample.text.items()}
    texts |= {text_group(*of): rows for of, rows in sample.set_text.items()}
    for name, rows in texts.items():
        for number, embedding in enumerate(rows):
            members[f"{name.lower()}.{number}.npy"] = npy(embedding)
    for name, embedding in sample.image_embeds.items():
        members[f"{image_embed_group(name).lower()}.npy"] = npy(embedding)
    for name, array in sample.arrays.items():
        members[f"{array_group(name).lower()}.npy"] = npy(array)
    return members


def npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    array, file = np.asarray(array, order="C"), io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    return file.getvalue() + array.tobytes()
