"""Files are whole or absent, whenever the process stops."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from imagen_core.store import StoreFolder
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.tally import Tally
from pipeline.errors import ConfigError, LockedError
from pipeline.options import RunOptions
from pipeline.storage import LocalStorage, files
from pipeline.storage.files import (
    TEMPORARY_MARK,
    commit_file,
    commit_folder,
    file_digest,
    read_json,
    remove_temporaries,
    temporary_name,
    unfinished_folder,
    write_json,
    write_text,
)
from tests.pipeline.toy import Toy, ToyConfig


def test_a_temporary_name_is_a_new_sibling_with_the_same_suffix(tmp_path: Path) -> None:
    final = tmp_path / "a" / "00000.parquet"
    names = {temporary_name(final) for _ in range(100)}
    assert len(names) == 100
    assert {name.parent for name in names} == {final.parent}
    assert all(name.name.startswith(TEMPORARY_MARK) and name.name.endswith("-00000.parquet") for name in names)


def test_a_commit_replaces_the_old_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    final = tmp_path / "f.txt"
    final.write_text("old")
    temporary = temporary_name(final)
    temporary.write_text("new")
    commit_file(temporary, final)
    assert [path.name for path in tmp_path.iterdir()] == ["f.txt"]
    assert final.read_text() == "new"


def test_bytes_are_durable_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        steps.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        steps.append(f"replace {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    folder = tmp_path / "folder"
    folder.mkdir()
    temporary = folder / "t"
    temporary.write_text("x")
    commit_file(temporary, folder / "final")
    assert steps == ["fsync t", "replace final", "fsync folder"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "f.txt", "old")

    def broken(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "f.txt", "new")
    monkeypatch.undo()
    assert (tmp_path / "f.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["f.txt"]


def test_a_failed_write_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(tmp_path / "f.txt", "new")
    assert caught.value.filename == str(tmp_path / "f.txt")


def test_new_folders_are_durable_before_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(files, "fsync_path", lambda path: synced.append(path.name))
    write_text(tmp_path / "a" / "b" / "f.txt", "x")
    assert [name if ".tmp-" not in name else "file" for name in synced] == [tmp_path.name, "a", "file", "b"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_hard_links_creates_a_file_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_links)
    for storage in (LocalStorage(tmp_path), StoreFolder(tmp_path / "store")):
        assert storage.create("f.json", b"first")
        assert not storage.create("f.json", b"second")
        assert (tmp_path / "f.json").read_bytes() == b"first"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["f.json", "f.json", "store"]


def test_other_errors_of_links_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    for storage in (LocalStorage(tmp_path), StoreFolder(tmp_path)):
        with pytest.raises(OSError, match="No space left"):
            storage.create("f.json", b"first")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_files_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / ".tmp-model" / "a" / "f.txt", "x")
    write_text(tmp_path / ".tmp-model" / "g.txt", "y")
    synced: list[str] = []
    monkeypatch.setattr(files, "fsync_path", lambda path: synced.append(path.name))
    commit_folder(tmp_path / ".tmp-model", tmp_path / "model")
    assert sorted(synced) == sorted([".tmp-model", "a", "f.txt", "g.txt", tmp_path.name])
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.txt")} == {
        "model/a/f.txt",
        "model/g.txt",
    }


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", bytes(8)])
def test_a_damaged_file_is_refused_by_name(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_bytes(data)
    for read in (lambda: read_json(tmp_path / "f.json"), lambda: LocalStorage(tmp_path).read_json("f.json")):
        with pytest.raises(ConfigError, match=r"f\.json: is damaged \(.*\); restore it from a copy, or delete it"):
            read()
    assert LocalStorage(tmp_path).read_json_if_whole("f.json") is None
    assert read_json(tmp_path / "absent.json") is None


def test_json_is_sorted_readable_and_the_same_every_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "f.json"
    write_json(path, {"b": 1, "a": "é 🐈"})
    assert path.read_bytes() == '{\n "a": "é 🐈",\n "b": 1\n}\n'.encode()
    assert [p.name for p in path.parent.iterdir()] == ["f.json"]


def test_text_that_is_not_unicode_stays_valid_json(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", {"key": "caf\udce9"})
    assert json.loads((tmp_path / "f.json").read_text(encoding="utf-8")) == {"key": "caf\udce9"}


@pytest.mark.parametrize("size", [0, 1, 1_000_003])
def test_a_file_digest_is_the_sha256_of_its_bytes(tmp_path: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "f").write_bytes(data)
    assert file_digest(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_a_run_ends_without_what_its_dead_workers_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = Scheduler.execute

    def with_a_death(scheduler: Scheduler) -> Tally:
        tally = execute(scheduler)
        (scheduler.run.root / "store" / "squares" / ".tmp-1-00000.txt").write_text("half")
        return tally

    monkeypatch.setattr(Scheduler, "execute", with_a_death)
    workflow = Toy(ToyConfig.model_validate({"toy": {"num_shards": 2}}))
    workflow.run(tmp_path / "run", RunOptions("inline", quiet=True))
    assert sorted(p.name for p in (tmp_path / "run" / "store" / "squares").iterdir()) == ["00000.txt", "00001.txt"]


def test_half_written_files_of_linked_groups_are_removed_and_those_of_other_runs_are_not(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    for name in ("run/store", "run/training", "run/input", "disk/images-64", "disk/data"):
        (tmp_path / name).mkdir(parents=True)
    (run / "store" / "images-64").symlink_to(disk / "images-64")
    (run / "input" / "data").symlink_to(disk / "data")
    (run / "training" / ".lock").touch()  # another run, perhaps at work
    left = [disk / "data" / ".tmp-1-mine", run / "training" / ".tmp-2-plan.json"]
    for path in (*left, disk / "images-64" / ".tmp-3-00000.h5", run / ".tmp-4-config.yaml"):
        path.write_text("half")
    LocalStorage(run).clean()
    assert sorted(path for path in tmp_path.rglob(".tmp-*") if path.is_file()) == sorted(left)


def test_only_what_is_half_written_is_removed(tmp_path: Path) -> None:
    for name in (".tmp-1-a.txt", "deep/er/.tmp-2-b.parquet", ".tmp-folder/inside.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    for name in ("a.txt", "deep/b.tmp", ".hidden", "deep/x.tmp-1"):
        (tmp_path / name).write_text("whole")
    assert remove_temporaries(tmp_path) == 3
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"a.txt", "deep/b.tmp", ".hidden", "deep/x.tmp-1"}
    assert remove_temporaries(tmp_path) == 0
    assert remove_temporaries(tmp_path / "absent") == 0


def test_an_unfinished_folder_is_made_by_one_process_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with unfinished_folder(target) as first:
        (first / "weights").write_text("of the first")
        words = r"--out .*/model: another process is writing it; wait for its end"
        with pytest.raises(LockedError, match=words), unfinished_folder(target):
            pass
        assert (first / "weights").read_text() == "of the first"
        with unfinished_folder(tmp_path / "other"):
            pass
        commit_folder(first, target)
        with unfinished_folder(target) as second:
            assert list(second.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_of_a_folder_is_cleared_or_gone_on_with(tmp_path: Path) -> None:
    left = tmp_path / f"{TEMPORARY_MARK}model"
    (left / "half").mkdir(parents=True)
    with unfinished_folder(tmp_path / "model", resume=True) as folder:
        assert (folder / "half").is_dir()
    assert (left / "half").is_dir()
    with unfinished_folder(tmp_path / "model") as folder:
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
    left.write_text("of an export by an earlier version")
    with unfinished_folder(tmp_path / "model") as folder:
        assert folder == left
    assert list(tmp_path.iterdir()) == []
