"""A later start takes the digests of shards from the run folder while no file has changed, and reads nothing."""

import csv
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StaleOutputError
from pipeline.stage import Shard
from pipeline.storage.record import Record
from pipeline.storage.run_folder import RunFolder
from stages.sources import tables
from stages.sources.incremental import InputBatches
from stages.sources.parquet import ParquetConfig
from stages.sources.tabular.table_rows import TableSource
from stages.sources.urls import UrlsConfig

ROWS = 25


def write(path: Path, rows: int = ROWS, word: str = "red", *, age_s: float = 100) -> None:
    keys = [f"k{row % 20}" for row in range(rows)]
    columns = {
        "url": [f"u{row}" for row in range(rows)],
        "caption": [f"{word} {row}" for row in range(rows)],
        "id": keys,
    }
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    else:
        pq.write_table(pa.table({**columns, "image": [b"i"] * rows}), path, row_group_size=7)
    time = path.stat().st_mtime - age_s
    os.utime(path, (time, time))


def source(kind: str, data: Path, *, keyed: bool = False) -> TableSource:
    config = ParquetConfig if kind == "images" else UrlsConfig
    return config(path=str(data), key_column="id" if keyed else None).build()


def start(kind: str, data: Path, run: Path, *, keyed: bool = False, read_all: bool = False) -> list[Shard]:
    """The shards of one start of a run."""
    batches = InputBatches(source(kind, data, keyed=keyed), RunFolder(run), 10, "samples")
    batches.begin_run()
    if read_all:
        batches.read_all()
    batches.record(restart=False)
    return list(batches.shards())


@contextmanager
def reads() -> Iterator[list[tuple[str, int]]]:
    """Collects which file was read from which row on."""
    found: list[tuple[str, int]] = []
    honest = tables.read_chunks
    tables._kept.clear()

    def reading(path: str, wanted: list[str], first: int, *others: Any) -> Iterator[tables.Chunk | range]:
        found.append((path.rpartition("/")[2], first))
        return honest(path, wanted, first, *others)

    with mock.patch.object(tables, "read_chunks", reading):
        yield found


KINDS = {"csv": "l.csv", "urls": "l.parquet", "images": "l.parquet"}


@pytest.mark.parametrize("keyed", [False, True], ids=["numbered", "keyed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_start_reads_nothing_and_has_the_same_shards(kind: str, keyed: bool, tmp_path: Path) -> None:
    write(tmp_path / KINDS[kind])
    first = start(kind, tmp_path / KINDS[kind], tmp_path / "run", keyed=keyed)
    rows = [shard.rows for shard in first]
    with reads() as found:
        second = start(kind, tmp_path / KINDS[kind], tmp_path / "run", keyed=keyed)
    assert (found, second) == ([], first)
    assert [shard.num_rows for shard in second] == [10, 10, 5]
    assert [pickle.loads(pickle.dumps(shard)).rows for shard in reversed(second)] == rows[::-1]
    repeated = [row[-1] for shard in rows for row in shard]
    assert repeated == ([False] * 20 + [True] * 5 if keyed else [False] * ROWS)


@pytest.mark.parametrize("kind", ["urls", "images"])
def test_a_plan_reads_no_row_of_parquet_and_its_shards_are_those_of_a_run(kind: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, rows in (("a", 25), ("b", 3), ("c", 12)):
        write(tmp_path / "data" / f"{name}.parquet", rows, name)
    batches = InputBatches(source(kind, tmp_path / "data"), RunFolder(tmp_path / "run"), 10, "samples")
    with reads() as found:
        planned = list(batches.shards())
    assert ([shard.num_rows for shard in planned], found) == ([10, 10, 10, 10], [])
    assert (
        planned == start(kind, tmp_path / "data", tmp_path / "run") == list(source(kind, tmp_path / "data").shards(10))
    )
    assert pickle.loads(pickle.dumps(planned[2])).rows == planned[2].rows


@pytest.mark.parametrize(("key_column", "where", "num_rows"), [("id", None, ROWS), (None, "id = 'k3'", 2)])
def test_a_plan_reads_the_rows_where_they_decide_which_shards_there_are(
    key_column: str | None, where: str | None, num_rows: int, tmp_path: Path
) -> None:
    pytest.importorskip("sqlglot")
    write(tmp_path / "l.parquet")
    config = UrlsConfig(path=str(tmp_path / "l.parquet"), key_column=key_column, where=where)
    with reads() as found:
        shards = InputBatches(config.build(), RunFolder(tmp_path), 10, "samples").shards()
        assert sum(shard.num_rows for shard in shards) == num_rows
    assert found


def test_a_plan_of_a_folder_with_finished_shards_reads_what_is_not_noted(tmp_path: Path) -> None:
    write(tmp_path / "l.parquet")
    run = RunFolder(tmp_path / "run")
    run.write_record(Record("samples", 0, "f", "i", 10, 10))
    with reads() as found:
        list(InputBatches(source("urls", tmp_path / "l.parquet"), run, 10, "samples").shards())
    assert found == [("l.parquet", 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_another_time_is_read_again(kind: str, tmp_path: Path) -> None:
    data = tmp_path / KINDS[kind]
    write(data)
    first = start(kind, data, tmp_path / "run")
    write(data, word="sea", age_s=50)
    second = start(kind, data, tmp_path / "run")
    same = kind == "images"  # its shards have the digest of the footer, which may be the same
    assert same or [shard.digest for shard in second] != [shard.digest for shard in first]
    assert [shard.digest for shard in second] == [shard.digest for shard in source(kind, data).shards(10)]


def test_check_input_reads_everything(tmp_path: Path) -> None:
    write(tmp_path / "l.csv")
    start("csv", tmp_path / "l.csv", tmp_path / "run")
    with reads() as found:
        start("csv", tmp_path / "l.csv", tmp_path / "run", read_all=True)
    assert found == [("l.csv", 0)]


def test_a_file_that_was_changed_just_now_is_not_noted(tmp_path: Path) -> None:
    write(tmp_path / "l.csv", age_s=0)
    start("csv", tmp_path / "l.csv", tmp_path / "run")
    with reads() as found:
        start("csv", tmp_path / "l.csv", tmp_path / "run")
    assert found == [("l.csv", 0)]


def test_other_settings_read_again(tmp_path: Path) -> None:
    write(tmp_path / "l.csv")
    start("csv", tmp_path / "l.csv", tmp_path / "run")
    with reads() as found:
        start("csv", tmp_path / "l.csv", tmp_path / "run", keyed=True)
    assert found == [("l.csv", 0)]


@pytest.mark.parametrize("keyed", [False, True], ids=["numbered", "keyed"])
def test_of_an_input_that_grew_only_the_new_file_is_read_unless_keys_may_repeat(keyed: bool, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.parquet")
    start("urls", data, tmp_path / "run", keyed=keyed)
    write(data / "b.parquet", 3, "new")
    with reads() as found:
        grown = start("urls", data, tmp_path / "run", keyed=keyed)
    assert found == ([("a.parquet", 0), ("b.parquet", 0)] if keyed else [("b.parquet", 0)])
    assert [shard.num_rows for shard in grown] == [10, 10, 5, 3]
    assert [row[0] for row in grown[-1].rows] == (["k0", "k1", "k2"] if keyed else [f"{n:09d}" for n in (25, 26, 27)])
    with reads() as found:
        assert start("urls", data, tmp_path / "run", keyed=keyed) == grown
    assert found == []


@pytest.mark.parametrize("name", ["l.csv", "l.parquet"])
def test_rows_that_were_appended_are_read_by_a_later_start_of_the_same_process(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    start("urls", tmp_path / name, tmp_path / "run")
    write(tmp_path / name, ROWS + 3, age_s=50)
    grown = start("urls", tmp_path / name, tmp_path / "run")
    assert [shard.num_rows for shard in grown] == [10, 10, 5, 3]
    assert [row[1] for row in grown[-1].rows] == ["u25", "u26", "u27"]


@pytest.mark.parametrize("name", ["l.csv", "l.parquet"])
def test_rows_that_are_not_those_noted_are_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    start("urls", tmp_path / name, tmp_path / "run")
    second = start("urls", tmp_path / name, tmp_path / "run")
    write(tmp_path / name, word="sea")
    tables._kept.clear()
    with pytest.raises(StaleOutputError, match=r"source.path: the rows of shard 00001 .* --check-input"):
        len(second[1].rows)


def test_damaged_notes_cost_one_reading(tmp_path: Path) -> None:
    write(tmp_path / "l.csv")
    first = start("csv", tmp_path / "l.csv", tmp_path / "run")
    notes = tmp_path / "run" / "input" / "known.jsonl"
    notes.write_bytes(notes.read_bytes().replace(b"0", b"1", 1))
    with reads() as found:
        assert start("csv", tmp_path / "l.csv", tmp_path / "run") == first
    assert found == [("l.csv", 0)]


def test_shards_of_large_row_groups_are_read_by_the_driver_in_one_pass(tmp_path: Path) -> None:
    write(tmp_path / "l.parquet")
    first = start("urls", tmp_path / "l.parquet", tmp_path / "run")
    with mock.patch.object(tables, "_MAX_AHEAD_ROWS", 5):
        with reads() as found:
            again = list(source("urls", tmp_path / "l.parquet").shards(10))
            copies = [pickle.loads(pickle.dumps(shard)) for shard in again]
        assert found == [("l.parquet", 0)]
    assert copies == first
