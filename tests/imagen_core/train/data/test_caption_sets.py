"""A training reads the sets of captions that its store has, by the store's weights or by its own."""

import shutil
from pathlib import Path

import pytest
import torch

from imagen_core.store import StoreError
from imagen_core.train import StoreLostError, TrainError, TrainingStart, train
from imagen_core.train.data.store import open_store, opened_again
from imagen_core.train.data.stores import open_stores
from imagen_core.train.data.stream import BatchStream
from imagen_core.train.parallel.world import World
from tests.imagen_core.store.caption_sets_added import add_caption_sets
from tests.imagen_core.train.small import first_batch, make_config, make_store


def brief(shard: int, row: int) -> list[str]:
    return [f"brief {shard} {row}"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 samples with captions of two sets; tests must not change it."""
    path = make_store(tmp_path_factory.mktemp("sets") / "store")
    add_caption_sets(path, {"brief": brief}, {"long": 0.75, "brief": 0.25})
    return path


def is_brief(text: torch.Tensor) -> list[bool]:
    """Which rows are of the further set: all of their values are the length of the caption."""
    return [bool((row[:2] == row[0, 0]).all()) for row in text]


def test_the_weights_of_the_store_hold_unless_the_training_has_its_own(sets: Path) -> None:
    text = first_batch(make_config(sets, batch_size=40)).raw["text"]
    assert 3 <= sum(is_brief(text)) <= 17  # 10 of 40 on average; 2.7 is one standard deviation
    assert all(is_brief(first_batch(make_config(sets, batch_size=40, captions={"brief": 2})).raw["text"]))
    without = first_batch(make_config(sets, batch_size=40, captions={"long": 1.0}))
    assert not any(is_brief(without.raw["text"]))


def test_processes_have_the_captions_that_one_alone_has(sets: Path) -> None:
    config = make_config(sets, batch_size=8)

    def read(world: World) -> list[tuple[list[str], torch.Tensor]]:
        stream = BatchStream(open_stores(config), config, world, None)
        batches = [stream.next() for _ in range(5)]
        stream.close()
        return [(batch.keys, batch.raw["text"]) for batch in batches]

    alone = read(World(0, 1, torch.device("cpu")))
    ranks = [read(World(rank, 2, torch.device("cpu"))) for rank in range(2)]
    for (keys, text), (first, one), (second, other) in zip(alone, *ranks, strict=True):
        assert keys == first + second
        assert is_brief(text) == is_brief(one) + is_brief(other)


def test_sets_that_the_store_lacks_are_refused_by_name(sets: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"captions: store .*: caption set 'short' is not .*; it has long, brief"):
        open_store(make_config(sets, captions={"short": 1.0}))
    path = make_store(tmp_path / "store")
    add_caption_sets(path, {"brief": brief}, {"long": 0.75, "brief": 0.25}, encoded=False)
    with pytest.raises(TrainError, match="caption set 'brief' is not encoded by 't5' in the store"):
        open_store(make_config(path))
    assert len(open_store(make_config(path, captions={"long": 1.0}))) == 40
    open_store(make_config(path), online=True)


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"long": 0.0}, "all weights are 0"), ({"long": -1.0}, "greater than or equal to 0"), ({"a": "b"}, "number")],
)
def test_weights_that_cannot_be_are_refused(sets: Path, weights: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(sets, captions=weights)


def test_a_store_made_again_with_other_captions_of_a_set_is_another_store(sets: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sets, tmp_path / "store"))
    config = make_config(copy)
    stores = open_stores(config)
    shutil.rmtree(copy)
    make_store(copy)
    add_caption_sets(copy, {"brief": lambda shard, row: ["other"]}, {"long": 0.75, "brief": 0.25})
    with pytest.raises(StoreLostError, match=r"captions-brief/00000\.parquet holds other captions"):
        opened_again(stores, config, StoreError("lost"), online=False)


@pytest.mark.slow
def test_a_start_tells_the_shares_of_the_sets(sets: Path, tmp_path: Path) -> None:
    shown: list[TrainingStart] = []
    train(make_config(sets, num_steps=1), tmp_path / "run", on_start=shown.append)
    assert shown[0].captions == {store_name(sets): {"long": 0.75, "brief": 0.25}}
    assert f"captions of {store_name(sets)}: long 0.75, brief 0.25" in shown[0].lines()
    train(make_config(sets, num_steps=2, captions={"long": 1.0}), tmp_path / "run", on_start=shown.append)
    assert shown[1].captions == {}
    assert shown[1].changes == ("captions: null -> (absent)", "captions.long: (absent) -> 1.0", "num_steps: 1 -> 2")


def store_name(path: Path) -> str:
    return path.parent.name
