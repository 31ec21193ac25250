"""Tars for webdataset, one per shard of the store.

Sample `SSSSS-RRRRRR` (index of the shard, row there) has `txt` (the first caption), `json` (all fields), `png` or
`jpg` (the largest images; `64.png` others), `text-t5.0.npy` (the embedding of the first caption),
`image-embed-clip.npy` and `array-mask.npy`; `text-t5-short.0.npy` is that of the first caption of the further set
`short`. Names of members are lower case, as webdataset reads them.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from imagen_core.store import array_group, image_embed_group, text_group
from pipeline.errors import ConfigError
from stages.exports.samples import ExportSample
from stages.exports.selection import Selection
from stages.exports.values import fields_of

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
    """Writes the tar, byte for byte as webdataset's `TarWriter` does; returns the number of samples."""
    count = 0
    with path.open("wb") as file:
        for sample in samples:
            key = "{:05d}-{:06d}".format(*sample.place)
            for name, parts in sorted(_members(sample, selection).items()):
                size = sum(map(len, parts))
                file.write(tar_header(f"{key}.{name}", size))
                file.writelines(parts)
                file.write(bytes(-size % tarfile.BLOCKSIZE))
            count += 1
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
    return count


def tar_header(name: str, size: int) -> bytes:
    """The header of a member; tarfile makes one that differs from others in more than name and size."""
    if len(name) > tarfile.LENGTH_NAME or not name.isascii() or size >= 1 << 33:
        return _tarfile_header(name, size)
    start = name.encode().ljust(tarfile.LENGTH_NAME, b"\0"), b"%011o\0" % size
    before, between, after = _PARTS
    checksum = _CHECKSUM + sum(start[0]) + sum(start[1])
    return b"".join((start[0], before, start[1], between, b"%06o\0" % checksum, after))


def _tarfile_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = size, 0o444, "bigdata", "bigdata"
    return member.tobuf()


_EMPTY = _tarfile_header("", 0)
_PARTS = _EMPTY[100:124], _EMPTY[136:148], _EMPTY[155:]
"""Of all headers: before the size, between it and the checksum, and after that."""
_CHECKSUM = int(_EMPTY[148:154], 8) - 11 * ord("0")
"""Of a header without name and size."""


def _members(sample: ExportSample, selection: Selection) -> dict[str, Sequence[bytes | memoryview]]:
    """The bytes of each member, in parts."""
    members: dict[str, Sequence[bytes | memoryview]] = {}
    for size, data in sample.images.items():
        suffix = SUFFIXES[selection.image_codec(selection.images[size])]
        largest = size == next(iter(selection.images))
        members[suffix if largest else f"{size}.{suffix}"] = (data,)
    members["txt"] = (sample.row.captions[0].encode(),)
    members["json"] = (json.dumps(fields_of(sample), ensure_ascii=False).encode(),)
    texts = {text_group(name): rows for name, rows in sample.text.items()}
    texts |= {text_group(*of): rows for of, rows in sample.set_text.items()}
    for name, rows in texts.items():
        for number, embedding in enumerate(rows):
            members[f"{name.lower()}.{number}.npy"] = npy_parts(embedding)
    for name, embedding in sample.image_embeds.items():
        members[f"{image_embed_group(name).lower()}.npy"] = npy_parts(embedding)
    for name, array in sample.arrays.items():
        members[f"{array_group(name).lower()}.npy"] = npy_parts(array)
    return members


def npy_parts(array: np.ndarray) -> tuple[bytes, memoryview]:
    """The header of a .npy file, and the array's bytes, which are not copied."""
    return _npy_header(array.dtype, array.shape), array.ravel().view(np.uint8).data


@lru_cache(1024)
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()
