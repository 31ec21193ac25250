"""Adds groups of arrays to a handmade store."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from imagen_core import store as st
from tests.imagen_core.store.handmade_store import file_entry, rewrite_manifest

MADE_BY = {"kind": "handmade", "threshold": 0.5}


def values_of(spec: st.ArraySpec, count: int = 12) -> list[np.ndarray]:
    """Arrays of the spec, of another shape in each row where an axis may differ."""
    rng = np.random.default_rng(7)
    result = []
    for row in range(count):
        shape = [(row + axis) % 4 if n is None else n for axis, n in enumerate(spec.shape)]
        if spec.dtype == "bool":
            result.append(rng.random(shape) < 0.5)
        elif "float" in spec.dtype:
            dtype = "float32" if spec.dtype == "bfloat16" else spec.dtype
            result.append(np.asarray(rng.integers(-100, 100, shape), dtype) / np.dtype(dtype).type(4))
        else:
            result.append(np.asarray(rng.integers(0, 100, shape), spec.dtype))
    return [np.asarray(value) for value in result]


def add_arrays(
    root: Path, name: str, spec: st.ArraySpec, values: list[np.ndarray], store_format: st.StoreFormat
) -> dict[str, Any]:
    """Writes one array per row, in the order of the store, excluded rows included; returns the manifest's groups."""
    header = json.loads((root / "manifest.json").read_bytes())
    description = {
        "kind": "array",
        "array": name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "format": store_format,
        "fingerprint": MADE_BY,
    }
    group, left = st.array_group(name), list(values)
    (root / group).mkdir()

    def write(shards: list[dict[str, Any]]) -> None:
        for shard in shards:
            samples = st.read_samples(root / shard["files"]["samples"]["path"])
            path = st.shard_path(group, shard["index"], store_format)
            with st.open_array_writer(root / path, spec, store_format, MADE_BY) as writer:
                for sample in samples:
                    writer.append(left.pop(0), sample.key)
            shard["files"][group] = file_entry(root, path, len(samples))

    groups = header["groups"] | {group: description}
    rewrite_manifest(root, write, groups=groups)
    return groups


def rewrite(root: Path, group: st.ArrayGroup, change: Callable[[list[np.ndarray], list[str]], None]) -> None:
    """Writes the first file of a group again with other rows or keys, and seals the store."""
    path = str(root / st.shard_path(group.name, 0, group.format))
    arrays = st.open_arrays(path, path, group, mapped=False)
    rows = [np.array(arrays.stored(row)) for row in range(arrays.num_rows)]
    keys = [sample.key for sample in st.read_samples(root / st.shard_path("samples", 0))]
    change(rows, keys)
    with st.open_array_writer(path, group.spec, group.format, group.fingerprint) as writer:
        for row, key in zip(rows, keys, strict=False):
            writer.append_stored(row, key)
    rewrite_manifest(root, groups=json.loads((root / "manifest.json").read_bytes())["groups"])
