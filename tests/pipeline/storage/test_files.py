"""Files are whole or absent, whenever the process stops."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from pipeline.engine.scheduler import Scheduler
from pipeline.engine.tally import Tally
from pipeline.options import RunOptions
from pipeline.storage import files
from pipeline.storage.files import (
    TEMPORARY_MARK,
    commit_file,
    file_digest,
    remove_temporaries,
    temporary_name,
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
