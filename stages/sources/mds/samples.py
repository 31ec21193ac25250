"""The samples of an MDS shard: a table of offsets, then the columns of each sample one after another.

Source: mosaicml-streaming 0.13, `base/format/mds/`; the encoding `bf16` is that of PRX, `dataset/mds_patches.py`.
"""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np

from stages.sources.caches.contents import widened
from stages.sources.mds.index import MdsShard
from stages.sources.records.cells import BadCell

IMAGES = ("bytes", "jpeg", "jpeg_array", "jpegarray", "png")
"""Encodings whose bytes are an image file."""
_OFFSET = np.dtype("<u4")
_ARRAY_DTYPES = {
    **dict.fromkeys((8, "uint8"), "<u1"),
    **dict.fromkeys((9, "int8"), "<i1"),
    **dict.fromkeys((16, "uint16"), "<u2"),
    **dict.fromkeys((17, "int16"), "<i2"),
    **dict.fromkeys((18, "float16"), "<f2"),
    **dict.fromkeys((32, "uint32"), "<u4"),
    **dict.fromkeys((33, "int32"), "<i4"),
    **dict.fromkeys((34, "float32"), "<f4"),
    **dict.fromkeys((64, "uint64"), "<u8"),
    **dict.fromkeys((65, "int64"), "<i8"),
    **dict.fromkeys((66, "float64"), "<f8"),
}
_SCALARS = {"int": "<i8", **{name: code for name, code in _ARRAY_DTYPES.items() if isinstance(name, str)}}


class BadSample(Exception):
    """Why a sample cannot be read."""


def read_sample(file: BinaryIO, shard: MdsShard, number: int, wanted: Iterable[str]) -> dict[str, bytes]:
    """The bytes of some columns of a sample; of columns that the shard does not have, nothing.

    Raises:
        BadSample: the file ends before, or its sizes do not fit.
    """
    file.seek(0)
    if _numbers(file, 1)[0] != shard.samples:
        raise BadSample("it has not as many samples as the index says")
    file.seek(_OFFSET.itemsize * (1 + number))
    begin, end = _numbers(file, 2)
    file.seek(begin)
    data = file.read(max(0, end - begin))
    if not data or len(data) != end - begin:
        raise BadSample("the file ends inside it")
    counted = [place for place, size in enumerate(shard.sizes) if not size]
    sizes = [int(size or 0) for size in shard.sizes]
    at = _OFFSET.itemsize * len(counted)
    for place, size in zip(counted, np.frombuffer(data[:at], _OFFSET).tolist(), strict=False):
        sizes[place] = size
    if at + sum(sizes) != len(data):
        raise BadSample(f"its columns take {at + sum(sizes)} bytes, and it has {len(data)}")
    found: dict[str, bytes] = {}
    names = frozenset(wanted)
    for column, size in zip(shard.encodings, sizes, strict=True):
        if column in names:
            found[column] = data[at : at + size]
        at += size
    return found


def _numbers(file: BinaryIO, count: int) -> list[int]:
    data = file.read(_OFFSET.itemsize * count)
    if len(data) != _OFFSET.itemsize * count:
        raise BadSample("the file ends before it")
    return np.frombuffer(data, _OFFSET).tolist()


def cell_of(data: bytes, encoding: str, column: str) -> Any:
    """A column as a cell of a table: text, a number, bytes, or what JSON holds.

    Raises:
        BadCell: it is encoded as anything else, or its bytes do not fit.
    """
    decode: Callable[[bytes], Any] | None = {
        "str": lambda each: each.decode("utf-8", "surrogateescape"),
        "json": json.loads,
        "str_int": int,
        "str_float": float,
        **dict.fromkeys(IMAGES, bytes),
    }.get(encoding)
    if encoding in _SCALARS:
        decode = lambda each: np.frombuffer(each, _SCALARS[encoding]).item()  # noqa: E731
    if decode is None:
        raise BadCell("unsupported_type", f"{column}: the encoding {encoding!r} is not read")
    try:
        return decode(data)
    except (ValueError, RecursionError) as error:
        raise BadCell("unsupported_type", f"{column}: {error}"[:200]) from error


def array_of(data: bytes, encoding: str) -> np.ndarray:
    """A column as an array; bfloat16 as float32.

    Raises:
        ValueError: it is no array, or its bytes do not fit.
    """
    name, _, settings = encoding.partition(":")
    if name == "bf16":
        count = int(np.frombuffer(data[:4], "<u4").item())
        shape = np.frombuffer(data[4 : 4 + 4 * count], "<i4").tolist()
        return widened(np.frombuffer(data[4 + 4 * count :], "<u2")).reshape(shape)
    if name != "ndarray":
        raise ValueError(f"the encoding {encoding!r} is no array of numbers")
    dtype, _, shape = settings.partition(":")
    kind: int | str = dtype
    at = 0
    if not dtype:
        kind, at = data[0], 1
    if kind not in _ARRAY_DTYPES:
        raise ValueError(f"an array of the type {kind}")
    if shape:
        dims = [int(each) for each in shape.split(",")]
    else:
        axes, width = data[at] >> 2, 1 << (data[at] & 3)
        dims = np.frombuffer(data[at + 1 : at + 1 + axes * width], f"<u{width}").tolist()
        at += 1 + axes * width
    values = np.frombuffer(data[at:], _ARRAY_DTYPES[kind])
    if len(values) != math.prod(dims):
        raise ValueError(f"{len(values)} numbers of the shape {tuple(dims)}")
    return values.reshape(dims)
