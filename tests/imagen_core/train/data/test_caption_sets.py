"""A training reads the sets of captions that its store has, by the store's weights or by its own."""

import shutil
from pathlib import Path

import pytest
import torch

from imagen_core.diffusion import Denoiser
from imagen_core.store import Mixture, Store, StoreError
from imagen_core.train import StoreLostError, TrainError, TrainingStart, train
from imagen_core.train.data.store import open_store, opened_again
from imagen_core.train.data.stores import open_stores
from imagen_core.train.data.stream import BatchStream
from imagen_core.train.evaluation import validation_loss
from imagen_core.train.parallel.world import World
from tests.imagen_core.store.caption_sets_added import add_caption_sets
from tests.imagen_core.train.small import first_batch, make_config, make_context, make_store


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


def test_each_store_of_a_mixture_may_have_weights_of_its_own(sets: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other" / "store")
    add_caption_sets(other, {"brief": brief, "more": brief}, {"long": 0.0, "brief": 1.0, "more": 0.0})
    validation = {"num_samples": 4, "every_steps": 1}

    def mixed(a: dict[str, float] | None, b: dict[str, float] | None, captions: dict[str, float] | None = None):
        shares = [{"path": str(sets), "name": "a", "captions": a}, {"path": str(other), "name": "b", "captions": b}]
        return make_config(None, stores=shares, batch_size=40, validation=validation, captions=captions)

    long, short = {"long": 1.0}, {"brief": 1.0}
    config = mixed(long, None)
    batch = first_batch(config)
    of_b = is_brief(batch.raw["text"])
    assert sum(of_b) == 20, "all samples of b, and none of a"
    found = first_batch(mixed(short, long))
    assert found.keys == batch.keys
    assert is_brief(found.raw["text"]) == [not each for each in of_b]
    assert not any(is_brief(first_batch(mixed(long, long, short)).raw["text"]))
    assert all(is_brief(first_batch(mixed(None, None, short)).raw["text"]))
    context = make_context(config, Denoiser(config.denoiser).double())
    alone = make_context(make_config(sets, captions=long, validation=validation), context.denoiser)
    assert validation_loss(context, "a") == pytest.approx(validation_loss(alone, store_name(sets)))
    with pytest.raises(TrainError, match=r"captions: store .*: caption set 'more' is not in the store"):
        open_stores(mixed({"more": 1.0}, None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": {"long": 0.0}}, "stores.0.captions: all weights are 0"),
        ({"captions": {"long": -1.0}}, "stores.0.captions.long"),
    ],
)
def test_weights_of_a_store_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        make_config(None, stores=[{"path": "a", **changes}, {"path": "b"}])


def test_a_mixture_in_python_takes_weights_by_store(sets: Path) -> None:
    one = Store.open(sets)
    stores, weights, own = {"a": one, "b": Store.open(sets)}, {"a": 1.0, "b": 1.0}, {"b": {"brief": 1.0}}
    loader = Mixture(stores, weights, caption_sets=own).loader(
        20, text="t5", captions=True, caption_sets={"long": 1.0}
    )
    batch = next(iter(loader))
    assert sum(caption.startswith("brief") for caption in batch["captions"]) == 10
    with pytest.raises(ValueError, match="weights, samples and caption_sets must name the stores a, b"):
        Mixture(stores, weights, caption_sets={"c": {"brief": 1.0}})


def store_name(path: Path) -> str:
    return path.parent.name
