"""Datasets: a file that ends early is refused, cells that cannot be used are drops, a hub that is away is told."""

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core.images import write_png
from pipeline.errors import ConfigError, MachineError
from pipeline.stage import Shard
from pipeline.storage.run_folder import RunFolder
from stages.sources.base import InputPart, Original
from stages.sources.huggingface import HuggingfaceConfig, HuggingfaceSource
from stages.sources.incremental import InputBatches, first_part

datasets = pytest.importorskip("datasets")
ROWS = 3000


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    datasets.Dataset.from_dict({"image": [b"x"] * ROWS, "text": ["a"] * ROWS}).save_to_disk(folder)
    return folder


def source(folder: Path) -> HuggingfaceSource:
    return HuggingfaceConfig(path=str(folder)).build()


def test_all_rows_of_a_whole_dataset_are_read(saved: Path) -> None:
    whole = source(saved)
    whole.check()
    assert sum(shard.num_rows for shard in whole.shards(1000)) == ROWS


@pytest.mark.parametrize("cut", ["between two batches", "at the end mark"])
def test_an_arrow_file_without_its_end_mark_is_refused(saved: Path, cut: str) -> None:
    (file,) = saved.glob("*.arrow")
    data = file.read_bytes()
    stream = pa.BufferReader(data)
    pa.ipc.open_stream(stream).read_next_batch()
    file.write_bytes(data[: stream.tell()] if cut == "between two batches" else data[:-8])
    assert (len(datasets.load_from_disk(saved)) == ROWS) is (cut == "at the end mark"), "datasets sees no damage"
    with pytest.raises(ConfigError, match=r"source.path: .*\.arrow ends without the end mark of Arrow"):
        list(source(saved).shards(1000))


def test_a_file_that_is_missing_or_cut_in_a_batch_is_refused(saved: Path) -> None:
    (file,) = saved.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"cannot be loaded: "):
        source(saved).check()
    file.unlink()
    with pytest.raises(ConfigError, match=r"cannot be loaded: "):
        source(saved).check()


def test_a_plan_leaves_out_captions_that_cannot_be_used(tmp_path: Path) -> None:
    rows = {"image": [b"x"] * 2, "text": ["a cat", None], "number": [1, 2]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    (shard,) = source(tmp_path / "data").shards(10)
    assert source(tmp_path / "data").captions(shard) == [("a cat",), ()]
    numbers = HuggingfaceConfig(path=str(tmp_path / "data"), caption_column="number").build()
    assert numbers.captions(shard) == [(), ()]


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", away)
    with pytest.raises(MachineError, match=r"the hub cannot be reached: Couldn't reach the hub; check the network"):
        source(Path("owner/name")).check()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "hashes"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(folder: Path, kind: str, caption: str = "b", value: int = 0) -> None:
    """Two rows, as Parquet, as an imagefolder, or as `save_to_disk` writes them."""
    rows = {"image": [b"x", bytes([value])], "text": ["a", caption]}
    if kind == "parquet":
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), folder / "train-00000.parquet")
    elif kind == "imagefolder":
        for name, level in (("0.png", 0), ("1.png", value)):
            write_png(folder / name, np.full((4, 4, 3), level, np.uint8))
        lines = ["file_name,text", "0.png,a", f"1.png,{caption}"]
        (folder / "metadata.csv").write_text("\n".join(lines))
    else:
        shutil.rmtree(folder, ignore_errors=True)
        datasets.Dataset.from_dict(rows).save_to_disk(folder)


def shards(folder: Path) -> list[Shard]:
    return list(source(folder).shards(10))


KINDS = ("parquet", "imagefolder", "save_to_disk")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_of_files_is_its_content_whatever_their_times_and_place(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "data", kind)
    before = shards(tmp_path / "data")
    for path in (tmp_path / "data").rglob("*"):
        os.utime(path, (1, 1))
    assert shards(tmp_path / "data") == before
    (tmp_path / "data").rename(tmp_path / "moved")
    assert shards(tmp_path / "moved") == before
    write(tmp_path / "moved", kind, value=7)
    assert shards(tmp_path / "moved") != before


def fetched(worker: HuggingfaceSource, shard: Shard, scratch: Path) -> list[Original]:
    found: list[Original] = []
    worker.fetch(shard, worker.rows_of(shard), scratch, found.append)
    return found


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_a_worker_that_finds_another_dataset_than_the_driver_refuses_it(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "data", kind)
    driver = source(tmp_path / "data")
    (shard,) = driver.shards(10)
    early, late = (pickle.loads(pickle.dumps(driver)) for _ in range(2))
    assert [original.captions for original in fetched(early, shard, tmp_path)] == [("a",), ("b",)]
    write(tmp_path / "data", kind, caption="c")
    for worker in (early, late):
        with pytest.raises(MachineError, match=r"this worker finds another dataset than the run began with: .* -> "):
            fetched(worker, shard, tmp_path)
        with pytest.raises(MachineError, match="this worker finds another dataset"):
            worker.captions(shard)
    write(tmp_path / "data", kind)
    assert [original.captions for original in fetched(late, shard, tmp_path)] == [("a",), ("b",)]


class Hub:
    """A hub with one dataset; each commit has a caption of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.branches, self.reachable, self.asked = {None: "a" * 40, "v2": "c" * 40}, True, []
        monkeypatch.setattr(datasets, "load_dataset_builder", self.load_dataset_builder)

    def load_dataset_builder(self, path: str, revision: str | None) -> Any:
        """As `datasets` does: where the hub cannot be reached, the newest copy in the cache, whatever its revision."""
        self.asked.append(revision)
        commit = self.branches.get(revision, revision) if self.reachable else "b" * 40
        dataset = datasets.Dataset.from_dict({"image": [b"x"], "text": [f"of {commit[0]}"]})
        return SimpleNamespace(
            repo_id=path,
            hash=commit,
            download_and_prepare=lambda: None,
            as_dataset=lambda **_: dataset,
        )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def begin(run: Path, **settings: Any) -> tuple[HuggingfaceSource, Shard]:
    """What the driver of a run does."""
    found = HuggingfaceConfig(path="owner/name", **settings).build()
    folder = RunFolder(run)
    found.resume(first_part(folder))
    found.check()
    batches = InputBatches(found, folder, 10, "samples")
    batches.record(restart=False)
    return found, next(batches.shards())


def test_a_revision_is_resolved_once_and_read_by_workers_and_by_the_resumed_run(hub: Hub, tmp_path: Path) -> None:
    driver, shard = begin(tmp_path / "run")
    assert hub.asked == [None]
    hub.branches[None] = "b" * 40
    worker = pickle.loads(pickle.dumps(driver))
    assert [original.captions for original in fetched(worker, shard, tmp_path)] == [("of a",)]
    assert begin(tmp_path / "run")[1] == shard
    assert hub.asked == [None, "a" * 40, "a" * 40]
    assert "commit " + "a" * 40 in (tmp_path / "run/input/00001.jsonl").read_text()
    assert begin(tmp_path / "new")[1].digest != shard.digest


def test_another_revision_is_resolved_anew(hub: Hub, tmp_path: Path) -> None:
    _, shard = begin(tmp_path / "run")
    other, changed = begin(tmp_path / "run", revision="v2")
    assert hub.asked == [None, "v2"]
    assert changed.digest != shard.digest
    assert [original.captions for original in fetched(other, changed, tmp_path)] == [("of c",)]


def test_a_worker_whose_cache_has_another_commit_refuses_it_where_the_hub_is_away(hub: Hub, tmp_path: Path) -> None:
    driver, shard = begin(tmp_path / "run")
    hub.reachable = False
    with pytest.raises(MachineError, match=r"this run reads commit a+, but `datasets` found b+: it takes the newest"):
        fetched(pickle.loads(pickle.dumps(driver)), shard, tmp_path)


def test_a_run_of_an_earlier_version_goes_on_where_the_library_finds_the_same_dataset(saved: Path) -> None:
    earlier = [InputPart("dataset")]
    shard = next(source(saved).shards(10, earlier))
    assert shard.rows[0] == ["000000000", 0, datasets.load_from_disk(saved)._fingerprint]
    assert shard.files == {}
    assert len(fetched(source(saved), shard, saved)) == 10


def test_a_url_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"source.path: 's3://bucket/data': .* is a hub id or a local folder; copy"):
        HuggingfaceConfig(path="s3://bucket/data").build().check()


def test_captions_of_a_further_column_are_read_by_row_without_the_images(tmp_path: Path) -> None:
    columns = {"image": [b"x"] * 5, "text": ["a"] * 5, "short": [["one", "uno"], None, [], ["four"], ["five"]]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "data")
    found = HuggingfaceConfig.model_validate(
        {"path": str(tmp_path / "data"), "captions": [{"column": "text"}, {"column": "short"}]}
    ).build()
    found.check()
    first, second = found.shards(3)
    assert found.caption_cells(first, "short") == [["one", "uno"], [], []]
    assert found.caption_cells(pickle.loads(pickle.dumps(second)), "short") == [["four"], ["five"]]
