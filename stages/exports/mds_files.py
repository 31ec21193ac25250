"""Writes MDS files, byte for byte as mosaicml-streaming does, which wants transformers 4 and torchvision.

A file is the number of its samples, where each of them starts and the last one ends (uint32, little endian), the
columns as JSON, and the samples: the sizes of the values whose size is not fixed (uint32), and the values.
Source: mosaicml-streaming 0.13, `base/format/mds/`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "index.json"
_SIZE_LIMIT = 1 << 26
_SIZE = np.dtype("<u4")
_INT = np.dtype("<i8")
_ARRAY_DTYPES = {
    np.dtype("uint8"): 8,
    np.dtype("int8"): 9,
    np.dtype("uint16"): 16,
    np.dtype("int16"): 17,
    np.dtype("float16"): 18,
    np.dtype("uint32"): 32,
    np.dtype("int32"): 33,
    np.dtype("float32"): 34,
    np.dtype("uint64"): 64,
    np.dtype("int64"): 65,
    np.dtype("float64"): 66,
}
_Parts = Sequence[bytes | memoryview]


def write_files(folder: Path, columns: Mapping[str, str], samples: Iterable[Mapping[str, Any]]) -> int:
    """Writes `shard.00000.mds` ... of at most 64 MiB, and their index; returns the number of samples.

    A sample's arrays and bytes are kept, not copied, until its file is written.

    Args:
        columns: encoding of each column, see `_ENCODE`.
        samples: the value of each column.
    """
    names = sorted(columns)
    described: dict[str, Any] = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [],
        "size_limit": _SIZE_LIMIT,
        "column_names": names,
        "column_encodings": [columns[name] for name in names],
        "column_sizes": [_INT.itemsize if columns[name] == "int" else None for name in names],
    }
    head = json.dumps(described, sort_keys=True).encode()
    encoders = [(name, _ENCODE[columns[name]], columns[name] != "int") for name in names]
    shards: list[dict[str, Any]] = []
    parts: list[bytes | memoryview] = []
    sizes: list[int] = []

    def flush() -> None:
        name = f"shard.{len(shards):05d}.mds"
        first = _SIZE.itemsize * (len(sizes) + 2) + len(head)
        offsets = list(accumulate(sizes, initial=first))
        with (folder / name).open("wb") as file:
            file.write(np.array([len(sizes), *offsets], _SIZE).tobytes() + head)
            file.writelines(parts)
        raw = {"basename": name, "bytes": offsets[-1], "hashes": {}}
        shards.append({"samples": len(sizes), "raw_data": raw, "zip_data": None, **described})

    count = 0
    size = empty = 2 * _SIZE.itemsize + len(head)
    for sample in samples:
        values = [encode(sample[name]) for name, encode, _ in encoders]
        lengths = [sum(map(len, value)) for value in values]
        counted = [length for length, (_, _, varies) in zip(lengths, encoders, strict=True) if varies]
        added = _SIZE.itemsize * len(counted) + sum(lengths)
        if parts and size + added + _SIZE.itemsize > _SIZE_LIMIT:
            flush()
            parts, sizes, size = [], [], empty
        parts.append(np.array(counted, _SIZE).tobytes())
        parts += [part for value in values for part in value]
        sizes.append(added)
        size += added + _SIZE.itemsize
        count += 1
    if parts:
        flush()
    (folder / INDEX).write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True), encoding="ascii")
    return count


def merge_indices(indices: Iterable[tuple[str, bytes]]) -> bytes:
    """One index of several folders.

    Args:
        indices: name of each folder, and its index.
    """
    shards = []
    for folder, data in indices:
        for shard in json.loads(data)["shards"]:
            shard["raw_data"]["basename"] = f"{folder}/{shard['raw_data']['basename']}"
            shards.append(shard)
    return json.dumps({"version": 2, "shards": shards}).encode()


def _array(array: np.ndarray) -> _Parts:
    """Its dtype, the number of its axes with the bytes that a length takes, their lengths, and its elements."""
    width = next(code for code in range(4) if max(array.shape) < 1 << (8 << code))
    lengths = np.array(array.shape, f"<u{1 << width}").tobytes()
    head = bytes((_ARRAY_DTYPES[array.dtype], array.ndim << 2 | width))
    return head + lengths, array.ravel().view(np.uint8).data


_ENCODE: dict[str, Callable[[Any], _Parts]] = {
    "str": lambda value: (value.encode(),),
    "int": lambda value: (value.to_bytes(_INT.itemsize, "little", signed=True),),
    "json": lambda value: (json.dumps(value).encode(),),
    "png": lambda value: (value,),
    "jpeg": lambda value: (value,),
    "ndarray": _array,
}
"""The bytes of a value by its encoding; of images the files are given, of arrays those with an axis and an element."""
