"""A training on several stores: what is refused, which samples it sees, and how it goes on with other weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_core.store import Store, StoreError
from imagen_core.train import StoreLostError, TrainConfig, TrainError, TrainingStart, train
from imagen_core.train.checkpoints.checkpoint import read_state
from imagen_core.train.data.store import opened_again, store_lost
from imagen_core.train.data.stores import open_stores, resumed_state
from imagen_core.train.data.stream import Batch, BatchStream
from imagen_core.train.parallel.world import World
from stages.store_tools.compact import compact
from tests.imagen_core.store.handmade_store import remove
from tests.imagen_core.train.small import ALONE, BASE, changed, files, make_config, make_store, metrics

ROWS = {"a": 14, "b": 5}
TWO = make_config(None, stores=[{"path": "a"}, {"path": "b"}]).model_dump()


def write_stores(folder: Path, **settings: Any) -> dict[str, Path]:
    """A of 14 samples, b of 5; keys begin with the store's name."""
    found = {}
    for name, rows in ROWS.items():
        fields = {"row_fields": lambda row, name=name: {"key": f"{name}{row}"}}
        found[name] = make_store(folder / name / "store", rows=(rows,), **fields, **settings)
    return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_stores(tmp_path_factory.mktemp("mixed"))


def mixed(stores: dict[str, Path], weights: tuple[float, ...] = (0.75, 0.25), **changes: Any) -> TrainConfig:
    shares = [{"path": str(path), "weight": weight} for path, weight in zip(stores.values(), weights, strict=True)]
    return make_config(None, stores=shares, **{"batch_size": 4, "ema": {"rates": []}, **changes})


def read(config: TrainConfig, count: int, world: World = ALONE, state: dict[str, Any] | None = None) -> list[Batch]:
    stream = BatchStream(open_stores(config), config, world, state)
    batches = [stream.next() for _ in range(count)]
    stream.close()
    return batches


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stores": ()}, "store: is missing; name the store to train on, or several as stores"),
        ({"store": "a/store"}, "stores: and store is 'a/store'; set store=null to mix stores"),
        ({"stores": [{"path": "a", "weight": 0}, {"path": "b", "weight": 0}]}, "stores: all weights are 0"),
        ({"stores": [{"path": "a", "weight": -1}]}, "greater than or equal to 0"),
        ({"stores": [{"path": "a", "weight": "NaN"}]}, "finite"),
        (
            {"stores": [{"path": "a"}, {"path": "./b/../a/"}]},
            r"stores\.1\.path: .* is there twice; name each store once",
        ),
        (
            {"stores": [{"path": "x/a/store"}, {"path": "y/a"}]},
            r"stores\.1\.name: 'a' is there twice; give one of them another stores\.1\.name",
        ),
        ({"data": {"samples": (0, 4)}}, r"data\.samples: is of one store; set stores\.N\.samples"),
        ({"stores": [{"path": "a", "weights": 1}]}, r"stores\.0\.weights\s+Extra inputs"),
    ],
)
def test_stores_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate({**TWO, **settings})


def test_a_store_is_called_by_its_run_or_its_name() -> None:
    shares = [{"path": "s3://bucket/laion/store"}, {"path": "sets/art/"}, {"path": "store", "weight": 2, "name": "c"}]
    config = make_config(None, stores=shares)
    assert config.shares == {"laion": 0.25, "art": 0.25, "c": 0.5}
    assert list(make_config(Path("RUN/store")).by_store()) == ["RUN"]


@pytest.mark.parametrize(
    ("other", "changes", "message"),
    [
        (
            {"model": "other"},
            {},
            r'stores: store b: its text-t5 is not made as that of store a: fingerprint\.model: "tiny" -> "other"',
        ),
        (
            {"buckets": True},
            {},
            r"stores: store b: its images-16 have other aspect-ratio buckets than those of store a: images\.aspect: "
            r"square -> buckets; mix stores that are made alike",
        ),
        ({"large_px": 64}, {}, r"store .*/b/store: has no images-16 \(sizes: \[32, 64\]\)"),
        ({}, {"validation": {"num_samples": 5}}, r"validation\.num_samples is 5, but the store has 5 samples"),
    ],
)
def test_stores_that_do_not_go_together_are_refused(
    stores: dict[str, Path], tmp_path: Path, other: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    both = {"a": stores["a"], "b": write_stores(tmp_path, **other)["b"]}
    with pytest.raises(TrainError, match=message):
        open_stores(mixed(both, **changes))


def test_batches_have_the_stores_shares_and_never_a_validation_sample(stores: dict[str, Path]) -> None:
    batches = read(mixed(stores, validation={"num_samples": 2}), 9)
    assert all([sum(key[0] == name for key in batch.keys) for name in ROWS] == [3, 1] for batch in batches)
    keys = [key for batch in batches for key in batch.keys]
    assert set(keys) == {f"a{row}" for row in range(12)} | {f"b{row}" for row in range(3)}
    assert [batch.counters.start for batch in batches] == list(range(0, 36, 4))
    assert batches[-1].epochs == {"epoch/a": 27 / 12, "epoch/b": 3.0}


def test_each_store_has_a_range_of_its_own(stores: dict[str, Path]) -> None:
    shares = [{"path": str(stores["a"]), "samples": (3, 6)}, {"path": str(stores["b"])}]
    keys = {key for batch in read(make_config(None, stores=shares, batch_size=4), 6) for key in batch.keys}
    assert keys == {"a3", "a4", "a5", "b0", "b1", "b2", "b3", "b4"}


def test_samples_and_their_numbers_are_the_same_after_2_then_1_then_3_processes(tmp_path: Path) -> None:
    stores = write_stores(tmp_path)
    config = mixed(stores, batch_size=6)
    straight = [pair for batch in read(config, 10) for pair in zip(batch.keys, batch.counters, strict=True)]
    gone = {straight[20][0], straight[44][0]}
    seen: list[str] = []
    state = None
    for world_size, count in ((2, 3), (1, 2), (3, 5)):
        parts = [
            read(config, count, World(rank, world_size, torch.device("cpu")), state) for rank in range(world_size)
        ]
        for steps in zip(*parts, strict=True):
            seen += [key for part in steps for key in part.keys]
            assert {part.global_size for part in steps} == {sum(len(part.keys) for part in steps)}
        state = json.loads(json.dumps(parts[0][-1].loader_state))
        for name in ROWS if world_size == 2 else ():
            remove(stores[name], key=sorted(key for key in gone if key[0] == name))
    assert seen == [key for key, _ in straight[:18]] + [key for key, _ in straight[18:] if key not in gone]
    assert sorted({counter for _, counter in straight}) == list(range(60))


def test_one_cache_serves_all_stores_and_they_share_the_open_files(stores: dict[str, Path], tmp_path: Path) -> None:
    config = mixed(stores, data={"cache_dir": str(tmp_path / "cache")})
    assert [batch.error for batch in read(config, 4)] == [None] * 4
    copies = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert len(copies) == 2 * 3  # of one shard each: samples, images of one size, embeddings
    assert {store.max_open_shards for store in open_stores(config).values()} == {32}


def test_a_training_goes_on_with_other_weights_and_says_so(stores: dict[str, Path], tmp_path: Path) -> None:
    shown: list[TrainingStart] = []
    settings: dict[str, Any] = {
        "validation": {"num_samples": 1, "every_steps": 4},
        "grid": {"every_steps": 4, "num_images": 3, "num_steps": 2},
        "logging": {"every_steps": 2},
    }
    train(mixed(stores, num_steps=2, **settings), tmp_path, on_start=shown.append)
    summary = train(mixed(stores, (0.25, 0.75), num_steps=4, **settings), tmp_path, on_start=shown.append)
    assert [store.name for store in shown[0].stores] == ["a", "b"]
    assert shown[0].lines()[1:] == [
        "data 17 samples, batches of 4: 2 steps are 8 samples; begins",
        "store a: 13 samples, 0.75 of each batch: 0.5 epochs",
        "store b: 4 samples, 0.25 of each batch: 0.5 epochs",
    ]
    assert "changed since the checkpoint: stores.a.weight: 0.75 -> 0.25" in shown[1].lines()
    state = read_state(Path(summary["checkpoint"]))
    assert state["loader"]["segments"] == [
        {"position": 0, "weights": {"a": 0.75, "b": 0.25}},
        {"position": 8, "weights": {"a": 0.25, "b": 0.75}},
    ]
    assert state["encoder"]["fingerprint"] == {"model": "tiny"}
    epochs = {"epoch/a": 8 / 13, "epoch/b": 2.0}
    last = [line for line in metrics(tmp_path) if "loss" in line][-1]
    assert {name: value for name, value in last.items() if name.startswith("epoch")} == epochs
    assert {name: value for name, value in summary.items() if name.startswith("epoch")} == epochs
    validated = metrics(tmp_path)[-1]
    mean = 0.25 * validated["validation_loss/a"] + 0.75 * validated["validation_loss/b"]
    assert validated["validation_loss"] == pytest.approx(mean)
    assert (tmp_path / "grids" / "step-00000004.png").exists()


@pytest.mark.slow
def test_a_stopped_training_on_a_mixture_ends_as_one_that_was_not(stores: dict[str, Path], tmp_path: Path) -> None:
    straight = train(mixed(stores, num_steps=6), tmp_path / "a")
    train(mixed(stores, num_steps=3), tmp_path / "b")
    resumed = train(mixed(stores, num_steps=6), tmp_path / "b")
    assert files(resumed["checkpoint"]) == files(straight["checkpoint"])


def test_a_training_of_one_store_becomes_one_of_several(stores: dict[str, Path]) -> None:
    single = make_config(stores["a"], batch_size=4)
    first = read(single, 2)
    saved = single.model_dump(mode="json")
    config = mixed(stores, (0.5, 0.5))
    state = resumed_state(first[-1].loader_state, saved, config)
    after = read(config, 3, state=state)
    own = [key for batch in [*first, *after] for key in batch.keys if key[0] == "a"]
    assert own == [key for batch in read(single, 4) for key in batch.keys][:14]
    assert after[0].counters.start == 8
    named = changed(config, stores=[{"path": str(stores["a"]), "name": "photos"}])
    assert read(named, 1, state=resumed_state(first[-1].loader_state, saved, named))[0].epochs == {
        "epoch/photos": 12 / 14
    }
    with pytest.raises(TrainError, match=r"is of the store .*a/store, which is not among them; add it, with weight 0"):
        resumed_state(first[-1].loader_state, saved, changed(config, stores=[{"path": str(stores["b"])}]))
    with pytest.raises(
        TrainError, match=r"the checkpoint is of the stores a, b; to go on with one of them give it as"
    ):
        resumed_state(after[-1].loader_state, saved, single)


def test_a_mixture_goes_on_when_one_of_its_stores_is_compacted_and_names_all_when_one_is_lost(tmp_path: Path) -> None:
    stores = write_stores(tmp_path)
    config = mixed(stores)
    before, error = open_stores(config), StoreError("images-16/00000.parquet: missing")
    remove(stores["b"], key=[Store.open(stores["b"])[1].key])
    compact(stores["b"], None)
    now = opened_again(before, config, error, online=False)
    assert (now["a"] is before["a"], len(now["b"])) == (True, 4)
    with pytest.raises(StoreLostError) as caught:
        opened_again(now, config, error, online=False)
    lost = str(store_lost(caught.value, config, 3, ALONE))
    assert lost.startswith(f"stores {stores['a']}, {stores['b']}: cannot be read any more: images-16/00000.parquet")
    assert f"check them with `pipeline verify {stores['a']} {stores['b']}`" in lost


def test_the_model_of_a_mixture_is_checked_against_each_store(stores: dict[str, Path]) -> None:
    with pytest.raises(TrainError, match=r"store .*/a/store: has no images-64"):
        open_stores(mixed(stores, denoiser=BASE | {"size_px": 64}))
