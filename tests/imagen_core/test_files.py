"""Files are whole or absent, and those with the same content have the same bytes."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from imagen_core import files
from imagen_core.files import append_line, sort_metadata, write_durably

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


def test_a_small_file_is_durable_before_it_has_its_name_and_its_folders_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real = os.replace
    monkeypatch.setattr(files, "fsync_path", lambda path: steps.append(f"sync {path.name}"))
    monkeypatch.setattr(files.os, "replace", lambda source, target: (steps.append("rename"), real(source, target)))
    write_durably(tmp_path / "a" / "f.json", b"{}")
    assert [step if ".tmp-" not in step else "sync file" for step in steps] == [
        f"sync {tmp_path.name}",
        "sync file",
        "rename",
        "sync a",
    ]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["f.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_durably(tmp_path / "f.json", b"old")

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fsync_path", full)
    with pytest.raises(OSError, match="No space left"):
        write_durably(tmp_path / "f.json", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("f.json", b"old")]


def test_a_line_never_continues_one_that_a_kill_left_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    append_line(path, "1")
    append_line(path, "2")
    assert path.read_bytes() == b"1\n2\n"
    path.write_bytes(b"1\n{half")
    append_line(path, "3")
    assert path.read_bytes() == b"1\n{half\n3\n"
