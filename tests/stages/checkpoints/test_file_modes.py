"""Files that this package writes have the mode that the umask asks for, also those that safetensors writes."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from imagen_core.files import share
from imagen_core.store import StoreFolder
from imagen_core.train.checkpoints.checkpoint import write_checkpoint
from stages.evaluation.features.base import Extracted
from stages.evaluation.features.files import write_features


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def checkpoint(folder: Path) -> None:
    write_checkpoint(folder, 1, {"model": {"a": torch.zeros(1)}}, {})


class Model:
    label = "model"

    def fingerprint(self) -> dict[str, object]:
        return {}


def features(folder: Path) -> None:
    write_features(folder / "features.safetensors", Extracted({"features": np.zeros((1, 2), np.float32)}), Model())


def lease(folder: Path) -> None:
    assert StoreFolder(folder).create("file.json", b"{}")


@pytest.mark.parametrize("write", [checkpoint, features, lease])
def test_written_files_have_the_mode_of_the_umask(umask: int, write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_sharing_a_file_leaves_the_umask(umask: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o600)
    share(tmp_path / "file")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert os.umask(umask) == umask
