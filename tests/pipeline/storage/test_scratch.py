"""Temporary files of ended processes go, those of living ones and of other machines stay."""

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from pipeline.storage import disk
from pipeline.storage import scratch as module
from pipeline.storage.scratch import clean_scratch, machine, scratch, temporary_file, temporary_folder

_NOBODY = 999_999_999  # above every limit of process ids
_OTHER = "node7-0123456789ab"  # another machine, or another boot of this one
_LONG_AGO = 1e9


@pytest.fixture
def above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, as of a new process, on a disk of this machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_scratch", None)
    monkeypatch.setattr(disk, "file_system_type", lambda _: "ext4")
    return tmp_path / f"imagen-precompute-{os.getuid()}"


def leave(above: Path, name: str, *, lock: bool = True, changed: float | None = None) -> Path:
    """A folder of a process that was killed while it wrote."""
    folder = above / name
    folder.mkdir(parents=True)
    (folder / "half").write_text("half")
    if lock:
        (folder / "lock").touch()
    if changed is not None:
        os.utime(folder, (changed, changed))
    return folder


def test_what_an_ended_process_left_is_removed_by_the_next(above: Path) -> None:
    leave(above, f"{machine()}-{_NOBODY}-abc")
    leave(above, f"{machine()}-{_NOBODY}-def", lock=False)
    mine = scratch()
    assert [path.name for path in above.iterdir()] == [mine.name]
    assert mine.name.startswith(f"{machine()}-{os.getpid()}-")
    assert clean_scratch() == 0, "its own stays"


def test_the_folder_of_a_living_process_stays(above: Path) -> None:
    other = leave(above, f"{machine()}-7-other")
    with (other / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        scratch()
        assert other.is_dir()
    leave(above, f"{machine()}-{os.getppid()}-new", lock=False)
    assert clean_scratch() == 1, "the one whose lock was released; the other process is about to take its lock"


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.something", ""])
def test_on_a_disk_of_several_machines_each_deletes_only_its_own(
    above: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(disk, "file_system_type", lambda _: kind)
    for number, name in enumerate([f"{_OTHER}-{_NOBODY}-a", f"{_NOBODY}-old", f"{_NOBODY}", "notes"]):
        leave(above, name, lock=number % 2 == 0, changed=_LONG_AGO)
    leave(above, f"{machine()}-{_NOBODY}-b")
    assert clean_scratch() == 1
    assert len(list(above.iterdir())) == 4


def test_on_a_disk_of_this_machine_the_lock_tells_of_earlier_boots_and_other_containers(above: Path) -> None:
    """Their process ids say nothing, their locks do."""
    leave(above, f"{_OTHER}-{os.getpid()}-ended")
    starting = leave(above, f"{_OTHER}-{_NOBODY}-starting", lock=False, changed=_LONG_AGO)
    assert clean_scratch() == 1
    assert list(above.iterdir()) == [starting]


def test_folders_of_earlier_versions_go_once_their_process_is_known_to_have_ended(above: Path) -> None:
    leave(above, f"{_NOBODY}-locked")
    leave(above, f"{_NOBODY}", lock=False, changed=_LONG_AGO)
    stay = {leave(above, f"{os.getpid()}", lock=False, changed=_LONG_AGO), leave(above, f"{_NOBODY}-new", lock=False)}
    assert clean_scratch() == 2
    assert set(above.iterdir()) == stay


def test_machines_and_boots_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine()
    assert machine() == here
    monkeypatch.setattr(module, "_boot", lambda: "another")
    after = machine()
    monkeypatch.setattr(module, "_process_namespace", lambda: "pid:[7]")
    assert len({here, after, machine()}) == 3


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
