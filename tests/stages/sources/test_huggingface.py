"""Datasets: a file that ends early is refused, cells that cannot be used are drops, a hub that is away is told."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import ConfigError, MachineError
from stages.sources.huggingface import HuggingfaceConfig, HuggingfaceSource

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

    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(MachineError, match=r"the hub cannot be reached: Couldn't reach the hub; check the network"):
        source(Path("owner/name")).check()
