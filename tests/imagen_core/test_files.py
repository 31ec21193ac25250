"""Files with the same content have the same bytes."""

import struct
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from imagen_core.files import sort_metadata

METADATA = {"zeta": 'Ä "quoted" \n line', "alpha": "1", "mid": "x", "beta": "\u2028"}


def test_safetensors_metadata_is_sorted_and_the_tensors_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, np.int64)}
    written = set()
    for _ in range(20):
        save_file(tensors, path, metadata=METADATA)
        sort_metadata(path)
        written.add(path.read_bytes())
    (data,) = written
    (length,) = struct.unpack("<Q", data[:8])
    places = [data.index(f'"{name}":'.encode()) for name in sorted(METADATA)]
    assert places == sorted(places)
    assert max(places) < length
    with safe_open(path, framework="np") as file:
        assert file.metadata() == METADATA
    assert all(np.array_equal(values, tensors[name]) for name, values in load_file(path).items())


def test_a_file_without_metadata_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones(3)}, path)
    before = path.read_bytes()
    sort_metadata(path)
    assert path.read_bytes() == before
