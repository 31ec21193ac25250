"""A training whose store is damaged, compacted, made again or gone meanwhile goes on, or saves and says why."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagen_core.store import Store, StoreError
from imagen_core.train import StoreLostError, TrainConfig, train
from imagen_core.train.checkpoints.checkpoint import checkpoints
from imagen_core.train.data.store import open_store, opened_again
from imagen_core.train.data.stores import open_stores
from imagen_core.train.data.stream import BatchStream
from stages.store_tools.compact import compact
from tests.imagen_core.store.handmade_store import remove
from tests.imagen_core.train.small import ALONE, files, make_config, make_store, metrics

ROWS = (2,) * 12
TINY: dict[str, Any] = {
    "batch_size": 2,
    "num_steps": 12,
    "data": {"shuffle_window_shards": 1},  # a batch is a shard
    "checkpoints": {"every_steps": 50},
    "ema": {"rates": []},
}


def train_while(config: TrainConfig, out: Path, change: Callable[[], object]) -> dict[str, Any]:
    """A training during which `change` happens to its store, after step 2, when 3 to 7 batches have been read."""
    return train(config, out, on_progress=lambda progress: change() if progress.step == 2 else None)


def lose(group: Path) -> None:
    for file in group.iterdir():
        file.unlink()


def saved(out: Path) -> list[str]:
    return [path.name for path in checkpoints(out / "checkpoints")]


@pytest.mark.slow
def test_a_training_saves_before_it_gives_up_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store", rows=ROWS)
    config = make_config(path, **TINY)
    straight = train(config, tmp_path / "straight")
    with pytest.raises(StoreLostError, match=r"any more: .*missing; the checkpoint of step .* is saved") as caught:
        train_while(config, tmp_path / "run", lambda: lose(path / "images-16"))
    assert not caught.value.again
    assert "check it with `pipeline verify" in str(caught.value)
    assert "made it again" not in str(caught.value), "never advice that would make the store again"
    (name,) = saved(tmp_path / "run")
    assert 2 <= int(name.removeprefix("step-")) <= 7
    shutil.rmtree(path)
    resumed = train(make_config(make_store(path, rows=ROWS), **TINY), tmp_path / "run")
    assert files(resumed["checkpoint"]) == files(straight["checkpoint"])
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 13))


def test_a_validation_that_cannot_read_the_store_saves_first(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store", rows=ROWS)
    config = make_config(path, **TINY, validation={"num_samples": 2, "every_steps": 2})
    with pytest.raises(StoreLostError, match=r"00011.parquet: missing; the checkpoint of step 2 is saved"):
        train_while(config, tmp_path / "run", (path / "images-16" / "00011.parquet").unlink)
    assert saved(tmp_path / "run") == ["step-00000002"]


def test_a_store_that_is_gone_may_come_back(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store", rows=ROWS)
    words = r"it is gone, or is being made again; the checkpoint of step . is saved; run the same command again to go"
    with pytest.raises(StoreLostError, match=words) as caught:
        train_while(make_config(path, **TINY), tmp_path / "run", lambda: shutil.rmtree(path))
    assert caught.value.again


@pytest.mark.slow
def test_a_training_goes_on_in_the_same_order_when_its_store_is_compacted(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store", rows=ROWS)
    config = make_config(path, **TINY, validation={"num_samples": 2, "every_steps": 12})
    stream = BatchStream(open_stores(config), config, ALONE, None)
    batches = [stream.next() for _ in range(11)]
    stream.close()
    straight = train(config, tmp_path / "straight")

    def compacted() -> None:
        remove(path, key=[batches[9].keys[1], Store.open(path)[-1].key])
        compact(path, None)

    train_while(config, tmp_path / "run", compacted)
    lines = [[line for line in metrics(tmp_path / run) if "loss" in line] for run in ("straight", "run")]
    assert [[line["loss"] for line in run[:9]] for run in lines] == [[line["loss"] for line in lines[0][:9]]] * 2
    assert [run[-1]["samples"] for run in lines] == [24, 23], "the removed sample is left out, and no other"
    assert straight["validation_loss"] is not None


def test_a_store_made_again_with_the_same_samples_is_read_on_and_another_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_store(tmp_path / "store")
    config = make_config(path)
    before, error = open_stores(config), StoreError("images-16/00000.parquet: missing")
    with pytest.raises(StoreLostError, match=r"images-16/00000.parquet: missing"):
        opened_again(before, config, error, online=False)
    remove(path, key=[Store.open(path)[7].key])
    compact(path, None)
    (now,) = opened_again(before, config, error, online=False).values()
    assert len(now) == 39
    assert "was compacted or made again while it was read" in caplog.text
    for changes, words in (
        ({"rows": (24, 15)}, "39 rows in 2 shards, not 40 in 2"),
        ({"model": "other"}, "text-t5 is by another encoder"),
        ({"row_fields": lambda row: {"url": "http://a"}}, "samples/00000.parquet holds other samples"),
    ):
        shutil.rmtree(path)
        make_store(path, **changes)
        with pytest.raises(StoreLostError, match=rf"made again with other content: {words}"):
            opened_again(before, config, error, online=False)


def test_a_training_with_where_goes_on_in_its_order_while_its_samples_are_erased(tmp_path: Path) -> None:
    pytest.importorskip("sqlglot")
    path = make_store(tmp_path / "store", rows=ROWS)
    config = make_config(path, where="width = 32", **TINY)
    before = open_stores(config)
    remove(path, key=["3-000"])
    compact(path, None)
    (now,) = opened_again(before, config, StoreError("gone"), online=False).values()
    assert len(open_store(config)) == 23
    assert [now.locate(index) for index in range(23)] == [open_store(config).locate(index) for index in range(23)]
    assert len(now.places(0)[0]) == 24, "the erased row, whose width is 0 now, keeps its place in the order"
