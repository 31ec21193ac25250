"""The cache of hashes of large files is optional."""

import hashlib
import logging
import os
from pathlib import Path

import pytest

from stages.encoders import model_files

SIZE = 2**26


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(SIZE)  # sparse
    return path


def test_a_cache_that_cannot_be_written_is_a_warning(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "no-folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
    with caplog.at_level(logging.WARNING):
        assert model_files._content_digest(weights) == hashlib.sha256(bytes(SIZE)).hexdigest()
    assert "no-folder/imagen-precompute: cannot be written" in caplog.text


def test_a_damaged_entry_is_made_again(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = model_files._content_digest(weights)
    (entry,) = (tmp_path / "cache" / "imagen-precompute").iterdir()
    entry.write_text("{")
    assert model_files._content_digest(weights) == expected
    assert expected in entry.read_text()


def test_other_weights_of_the_same_size_and_time_are_hashed_again(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before, status = model_files._content_digest(weights), weights.stat()
    with weights.open("r+b") as file:
        file.write(b"1")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert model_files._content_digest(weights) != before
