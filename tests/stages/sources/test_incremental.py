"""An input that grows: what earlier runs noted keeps its shards, and what is new follows them."""

import csv
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StaleOutputError
from pipeline.stage import Shard
from pipeline.storage.run_folder import RunFolder
from stages.precompute.fetch import fetch_originals
from stages.sources.base import Original, Source
from stages.sources.folder import FolderConfig
from stages.sources.incremental import InputBatches
from stages.sources.parquet import ParquetConfig
from stages.sources.tars import WebdatasetConfig
from stages.sources.urls import UrlsConfig

SHARD_SIZE = 2


def write_images(root: Path, name: str, keys: Sequence[str]) -> None:
    for key in keys:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{key}.png").write_bytes(key.encode())
        (root / name / f"{key}.txt").write_text(f"caption of {key}\n")


def write_tar(root: Path, name: str, keys: Sequence[str]) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / f"{name}.tar", "w") as archive:
        for key in keys:
            for member, data in ((f"{key}.png", key), (f"{key}.txt", f"caption of {key}")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data.encode()))


def write_parquet(root: Path, name: str, keys: Sequence[str]) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    columns = {"id": keys, "image": [key.encode() for key in keys], "caption": [f"caption of {key}" for key in keys]}
    pq.write_table(pa.table(columns), root / f"{name}.parquet")


def write_list(root: Path, name: str, keys: Sequence[str]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("id", "url", "caption"), *((k, f"http://x/{k}", f"caption of {k}") for k in keys)]
        )


Write = Callable[[Path, str, Sequence[str]], None]
KINDS: dict[str, tuple[Write, Callable[[Path], Source]]] = {
    "urls": (write_list, lambda path: UrlsConfig(path=str(path), key_column="id").build()),
    "numbered urls": (write_list, lambda path: UrlsConfig(path=str(path)).build()),
    "webdataset": (write_tar, lambda path: WebdatasetConfig(path=str(path)).build()),
    "parquet": (write_parquet, lambda path: ParquetConfig(path=str(path)).build()),
    "keyed parquet": (write_parquet, lambda path: ParquetConfig(path=str(path), key_column="id").build()),
    "folder": (write_images, lambda path: FolderConfig(path=str(path)).build()),
    "folder URL": (write_images, lambda path: FolderConfig(path=f"file://{path}").build()),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def look(kind: str, data: Path, run: RunFolder) -> InputBatches:
    """As a process does that has just been started."""
    return InputBatches(KINDS[kind][1](data), run, SHARD_SIZE, "samples")


def record(kind: str, data: Path, run: RunFolder, *, restart: bool = False) -> list[Shard]:
    """Notes the input, and says of the first shard that it was made."""
    batches = look(kind, data, run)
    batches.record(restart=restart)
    run.storage.write_json(run.record_name("samples", "00000"), {})
    return list(batches.shards())


def files(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.root / "input").iterdir()}


def keys(shards: Sequence[Shard]) -> list[list[str]]:
    return [[str(row[0]) for row in shard.rows] for shard in shards]


@kinds
def test_new_files_add_shards_and_leave_the_others_as_they_were(kind: str, data: Path, run: RunFolder) -> None:
    write, _ = KINDS[kind]
    write(data, "b", ["b0", "b1"])
    write(data, "d", ["d0"])
    first = record(kind, data, run)
    assert [shard.num_rows for shard in first] == [2, 1]
    write(data, "a", ["a0"])
    write(data, "c", ["c0", "c1"])
    planned = list(look(kind, data, run).shards())
    assert list(files(run)) == ["00001.jsonl"], "looking writes nothing"
    second = record(kind, data, run)
    assert planned == second
    assert second[:2] == first
    assert [(shard.index, shard.num_rows) for shard in second[2:]] == [(2, 2), (3, 1)]
    found = [key for shard in keys(second) for key in shard]
    assert len(set(found)) == 6, "no key twice"
    before = files(run)
    assert sorted(before) == ["00001.jsonl", "00002.jsonl"]
    assert not look(kind, data, run).has_new_input()
    assert record(kind, data, run) == second
    assert files(run) == before, "nothing new, no batch"


@kinds
def test_what_appears_after_the_look_is_left_to_the_next_run(kind: str, data: Path, run: RunFolder) -> None:
    write, _ = KINDS[kind]
    write(data, "b", ["b0", "b1"])
    batches = look(kind, data, run)
    first = list(batches.shards())
    write(data, "a", ["a0"])
    batches.record(restart=False)
    write(data, "c", ["c0"])
    assert list(batches.shards()) == first
    assert [shard.num_rows for shard in record(kind, data, run)] == [2, 2]


@kinds
def test_a_piece_that_is_gone_is_named_and_restart_takes_it_out_of_its_batch_alone(
    kind: str, data: Path, run: RunFolder
) -> None:
    write, _ = KINDS[kind]
    for name in "bd":
        write(data, name, [f"{name}0", f"{name}1"])
    record(kind, data, run)
    write(data, "a", ["a0", "a1"])
    second = record(kind, data, run)
    before = files(run)
    gone = sorted(data.rglob("d*.*"))
    for path in gone:
        path.unlink()
    for act in (lambda b: list(b.shards()), lambda b: b.has_new_input() or b.record(restart=False)):
        with pytest.raises(StaleOutputError, match=rf"{gone[0].relative_to(data)}: gone"):
            act(look(kind, data, run))
    assert files(run) == before
    third = record(kind, data, run, restart=True)
    assert third[0] == second[0]
    assert [shard.num_rows for shard in third] == [2, 2]
    if kind != "numbered urls":
        assert keys(third)[1] == keys(second)[2]


@kinds
def test_a_list_of_pieces_that_nothing_was_made_of_gives_way(
    kind: str, data: Path, tmp_path: Path, run: RunFolder
) -> None:
    write, _ = KINDS[kind]
    write(tmp_path / "wrong", "w", ["w0"])
    look(kind, tmp_path / "wrong", run).record(restart=False)
    write(data, "b", ["b0", "b1"])
    expected = list(look(kind, data, RunFolder(tmp_path / "other")).shards())
    assert record(kind, data, run) == expected
    assert list(files(run)) == ["00001.jsonl"]


@kinds
def test_a_kill_while_the_list_is_written_leaves_none(
    kind: str, data: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    write, _ = KINDS[kind]
    write(data, "b", ["b0", "b1"])
    with monkeypatch.context() as patch:
        patch.setattr(type(run.storage), "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            look(kind, data, run).record(restart=False)
    write(data, "a", ["a0"])
    assert len(record(kind, data, run)) == 2
    run.storage.clean()
    assert list(files(run)) == ["00001.jsonl"], "both files are one batch"


def test_rows_appended_to_a_list_follow_those_of_other_files(data: Path, run: RunFolder) -> None:
    write_list(data, "b", ["b0", "b1", "b2"])
    first = record("numbered urls", data, run)
    write_list(data, "a", ["a0"])
    record("numbered urls", data, run)
    write_list(data, "b", ["b0", "b1", "b2", "b3", "b4"])
    write_list(data, "c", ["c0"])
    third = record("numbered urls", data, run)
    assert third[:2] == first
    rows = [[(row[0], row[1][-2:]) for row in shard.rows] for shard in third]
    assert rows[2:] == [
        [("000000003", "a0")],
        [("000000004", "b3"), ("000000005", "b4")],
        [("000000006", "c0")],
    ]
    write_list(data, "b", ["b0", "b1"])
    with pytest.raises(StaleOutputError, match=r"b\.csv: 5 rows then, 2 now"):
        list(look("numbered urls", data, run).shards())
    restarted = record("numbered urls", data, run, restart=True)
    assert [row[1][-2:] for shard in restarted for row in shard.rows] == ["b0", "b1", "a0", "c0"]


def test_rows_appended_while_a_run_goes_on_are_left_to_the_next(data: Path, run: RunFolder) -> None:
    write_list(data, "l", ["a", "b", "c"])
    batches = look("numbered urls", data, run)
    batches.record(restart=False)
    write_list(data, "l", ["a", "b", "c", "d"])
    assert [shard.num_rows for shard in batches.shards()] == [2, 1]
    assert [shard.num_rows for shard in look("numbered urls", data, run).shards()] == [2, 1, 1], "killed, resumed"


def test_a_restart_for_another_file_still_finds_appended_rows(data: Path, run: RunFolder) -> None:
    write_list(data, "a", ["a0"])
    write_list(data, "b", ["b0", "b1"])
    record("urls", data, run)
    (data / "a.csv").unlink()
    write_list(data, "b", ["b0", "b1", "b2"])
    assert keys(record("urls", data, run, restart=True)) == [["b0", "b1"], ["b2"]]


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_a_file_with_images_must_not_change(suffix: str, data: Path, run: RunFolder) -> None:
    kind = {"tar": "webdataset", "parquet": "parquet"}[suffix]
    KINDS[kind][0](data, "a", ["x"])
    record(kind, data, run)
    KINDS[kind][0](data, "a", [f"{i:03d}" * 20 for i in range(30)])
    with pytest.raises(StaleOutputError, match=rf"a\.{suffix}: [\d,]+ bytes then, [\d,]+ now"):
        list(look(kind, data, run).shards())


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_file_of_the_same_name_in_another_folder_changes_no_key_and_each_is_read(
    kind: str, data: Path, tmp_path: Path, run: RunFolder
) -> None:
    write, make = KINDS[kind]
    write(data, "day1/00000", ["old"])
    first = record(kind, data, run)
    write(data, "day2/00000", ["new"])
    shards = record(kind, data, run)
    assert shards[:1] == first
    assert [key[0].split("/")[:-1] for key in keys(shards)] == [["00000"], ["day2", "00000"]]
    for shard, expected in zip(shards, [b"old", b"new"], strict=True):
        read: list[Original] = []
        fetch_originals(make(data), shard, None, tmp_path, read.append)
        assert [original.data for original in read] == [expected]


@pytest.mark.parametrize("kind", ["urls", "keyed parquet"])
def test_the_first_row_of_a_key_stays_the_first(kind: str, data: Path, run: RunFolder) -> None:
    write, _ = KINDS[kind]
    write(data, "b", ["x", "y"])
    record(kind, data, run)
    write(data, "a", ["x", "z"])
    rows = [(row[0], row[-1]) for shard in record(kind, data, run) for row in shard.rows]
    assert rows == [("x", False), ("y", False), ("x", True), ("z", False)]


def test_names_that_are_no_utf_8_are_noted(data: Path, run: RunFolder) -> None:
    (data).mkdir()
    (data / "caf\udce9.png").write_bytes(b"1")
    first = record("folder", data, run)
    assert keys(first) == [["caf\udce9.png"]]
    assert record("folder", data, run) == first
