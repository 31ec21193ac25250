"""Temporary files of ended processes go, those of living ones stay."""

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from pipeline.storage import scratch as module
from pipeline.storage.scratch import clean_scratch, scratch, temporary_file, temporary_folder

_NOBODY = 999_999_999  # above every limit of process ids


@pytest.fixture
def above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, as of a new process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_scratch", None)
    return tmp_path / f"imagen-precompute-{os.getuid()}"


def test_what_an_ended_process_left_is_removed_by_the_next(above: Path) -> None:
    killed = above / f"{_NOBODY}-abc"
    killed.mkdir(parents=True)
    (killed / "lock").touch()
    (killed / "half").write_text("half")
    (above / f"{_NOBODY}-def").mkdir()  # killed before it had a lock
    mine = scratch()
    assert [path.name for path in above.iterdir()] == [mine.name]
    assert clean_scratch() == 0, "its own stays"


def test_the_folder_of_a_living_process_stays(above: Path) -> None:
    (above / "7-other").mkdir(parents=True)
    with (above / "7-other" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        scratch()
        assert (above / "7-other").is_dir()
    assert clean_scratch() == 1


def test_folders_go_with_their_block_and_files_with_their_owner(above: Path) -> None:
    class Owner:
        pass

    owner = Owner()
    path = temporary_file(owner, "list-")
    with temporary_folder("model-") as folder:
        (folder / "weights").write_text("1")
    assert not folder.exists()
    assert (path.exists(), path.parent) == (True, scratch())
    del owner
    assert not path.exists()
