"""A sealed file proves each of its bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from imagen_core.files import sort_metadata, write_durably
from imagen_core.sealed import (
    SEAL,
    UNSEALED,
    DamagedFileError,
    check_tensors,
    read_sealed,
    seal_tensors,
    write_sealed,
)

VALUE = {"step": 3, "name": 'Ä "quoted" \udc80', "files": {"a": [1, 2.5, None]}}


@pytest.mark.parametrize("value", [VALUE, {}, {"sha": "x"}])
def test_a_sealed_object_is_read_as_it_was_written_and_is_plain_json(tmp_path: Path, value: dict) -> None:
    path = tmp_path / "new" / "a.json"
    write_sealed(path, value)
    assert read_sealed(path) == value
    plain = json.loads(path.read_text(encoding="utf-8"))
    assert len(plain.pop(SEAL)) == 64
    assert plain == value
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_each_changed_lost_or_added_byte_of_a_sealed_object_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed(path, {"step": 3, "loss": 0.25})
    data = path.read_bytes()
    key = range(data.index(b'"sha256"'), data.index(b'"sha256"') + len(b'"sha256"'))
    damaged = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(len(data)) if i not in key]
    for changed in [*damaged, *(data[:i] for i in range(len(data))), data + b" ", b"[]", b"\xff", b"[" * 100_000]:
        path.write_bytes(changed)
        with pytest.raises(DamagedFileError, match=r"a\.json: (cannot be read|was changed)"):
            read_sealed(path)


def test_an_object_without_a_seal_is_one_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"step": 3}', encoding="utf-8")
    assert read_sealed(tmp_path / "a.json") == {"step": 3}


def test_each_changed_byte_of_sealed_tensors_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": np.arange(4, dtype=np.float32)}, path, metadata={"format": "np", SEAL: UNSEALED})
    sort_metadata(path)
    seal_tensors(path)
    check_tensors(path)
    assert load_file(path)["a"].tolist() == [0, 1, 2, 3]
    data = path.read_bytes()
    digest = data.index(b'"sha256":"')
    for i in [*range(8, digest), *range(digest + 9, len(data))]:
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises((DamagedFileError, SafetensorError)):
            _check_and_load(path)


def _check_and_load(path: Path) -> None:
    check_tensors(path)
    load_file(path)


def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_durably(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.json", b"old")]
