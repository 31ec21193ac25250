"""What is damaged or deleted in the folder of a precompute run: made again, or refused by name."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from imagen_core.store.files import parquet
from tests.commands import call, drops, precompute, summary, tree
from tests.runs import SMALL, store_bytes


def listed(run: Path) -> dict[str, list[tuple[int, str, str]]]:
    """Row, key and reason of the drops in each list."""
    lists = sorted((run / "quarantine").rglob("*.jsonl"))
    rows = {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in lists}
    return {name: [(line["row"], line["key"], line["reason"]) for line in lines] for name, lines in rows.items()}


def test_a_deleted_list_of_drops_is_written_again_and_counts_as_before(copy_of_small_run: Path) -> None:
    run = copy_of_small_run
    assert precompute(run, *SMALL, "--retry-dropped", "all").code == 0
    before, tally, store = listed(run), summary(run)["tally"], store_bytes(run)
    assert len(before) == 2, "the first try of a row, and its second"
    shutil.rmtree(run / "quarantine")
    assert precompute(run, *SMALL).code == 0
    assert listed(run) == before
    assert summary(run)["tally"]["groups"] == tally["groups"]
    assert store_bytes(run) == store
    assert precompute(run, *SMALL, "--retry-dropped", "http_404").code == 0
    assert drops(run)[-1] == ("000000002", "http_404")


def test_a_damaged_list_of_the_input_is_refused_by_name_and_nothing_is_lost(copy_of_small_run: Path) -> None:
    run = copy_of_small_run
    path, store = run / "input/00001.jsonl", store_bytes(run)
    whole = path.read_bytes()
    for data, place in (
        (b"\xff\n", " line 1"),
        (b'{"path": \n', " line 1"),
        (b'{"unknown": 1, "path": "a"}\n', " entry 1"),
        (whole[: whole.rindex(b"\n", 0, -1) + 1], ""),
        (whole.replace(b"scenes", b"sce.es"), ""),
        (b"", ""),
    ):
        path.write_bytes(data)
        result = precompute(run, *SMALL)
        assert result.code == 2
        assert f"input/00001.jsonl{place}: is damaged (" in result.err
        assert "restore it from a copy: it has the input of this run's shards" in result.err
    assert store_bytes(run) == store


def test_a_full_disk_ends_a_report_with_words_and_leaves_nothing(
    copy_of_small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(copy_of_small_run)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pipeline.storage.files.fsync_path", full)
    result = call("report", str(copy_of_small_run))
    assert result.code == 4
    assert "No space left on device" in result.err
    assert str(copy_of_small_run) in result.err
    monkeypatch.undo()
    assert tree(copy_of_small_run) == before


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), ValueError("Too many open files")])
def test_too_many_open_files_do_not_read_as_damage(
    error: Exception, small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_file(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(parquet.pq, "ParquetFile", open_file)
    for command in (("verify",), ("report",), ("remove", "--key", "000000003", "--dry-run")):
        result = call(command[0], str(small_run), *command[1:])
        assert result.code == 4, result.err
        assert "ulimit -n" in result.err


def test_a_report_leaves_nothing_of_a_killed_one(copy_of_small_run: Path) -> None:
    (copy_of_small_run / "report").mkdir()
    (copy_of_small_run / "report" / ".tmp-0123-index.html").write_text("half")
    assert call("report", str(copy_of_small_run)).code == 0
    assert [path.name for path in (copy_of_small_run / "report").iterdir()] == ["index.html"]
