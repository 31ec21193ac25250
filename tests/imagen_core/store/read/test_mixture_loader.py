"""Mixtures: exact shares, each store once an epoch of its own, and the same order however it is run."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from imagen_core.store import Mixture, Store
from imagen_core.store.buckets import bucket_shapes, scaled
from imagen_core.store.read.mixture_loader import MixtureLoader, as_mixture_state, check_state, consumed, epochs
from tests.imagen_core.store.handmade_store import Made, remove

Make = Callable[..., Made]
SIZES = {"a": (13, 10), "b": (4, 3)}


@pytest.fixture
def made(make: Make) -> dict[str, Made]:
    return {
        name: make(name, shard_rows=rows, sizes=(4,), key_prefix=f"{name}/", seed=ord(name))
        for name, rows in SIZES.items()
    }


def opened(made: dict[str, Made]) -> dict[str, Store]:
    return {name: Store.open(one.path) for name, one in made.items()}


def loader(made: dict[str, Made], batch_size: int = 4, weights: tuple[float, ...] = (0.7, 0.3), **options: Any):
    stores = opened(made)
    return Mixture(stores, dict(zip(stores, weights, strict=True))).loader(batch_size, **options)


def keys_of(mixed: MixtureLoader, batches: int) -> list[str]:
    return [key for batch in islice(mixed, batches) for key in batch["keys"]]


def test_each_store_has_its_share_and_each_of_its_samples_once_in_its_epoch(made: dict[str, Made]) -> None:
    mixed = loader(made, batch_size=10)
    for name, number in (("a", 7), ("b", 3)):
        counts = [sum(key[0] == name for key in batch["keys"]) for batch in islice(loader(made, 10), 20)]
        assert counts == [number] * 20
    keys = keys_of(mixed, 46)
    for name, one in made.items():
        own = [key for key in keys if key[0] == name]
        passes = [own[start : start + len(one.keys)] for start in range(0, len(own), len(one.keys))]
        assert len(passes) >= 14
        assert all(sorted(epoch) == one.keys for epoch in passes[:-1])
        assert len({tuple(epoch) for epoch in passes}) == len(passes)
    assert epochs(mixed.state_dict()) == {"a": pytest.approx(14.0), "b": pytest.approx(138 / 7)}


def test_a_batch_holds_the_values_of_the_samples_of_all_stores(made: dict[str, Made]) -> None:
    samples = {sample.key: sample for store in opened(made).values() for sample in store}
    batch = next(iter(loader(made, 10, images=[4], text="t5", captions=True)))
    for k, key in enumerate(batch["keys"]):
        assert torch.equal(batch["images"][4][k].permute(1, 2, 0), torch.from_numpy(samples[key].images[4]))
        number = samples[key].captions.index(batch["captions"][k])
        text = batch["text"][k][batch["text_mask"][k]]
        assert torch.equal(text, torch.from_numpy(samples[key].text["t5"][number]))


def test_stores_of_the_same_length_are_read_in_different_orders(make: Make) -> None:
    twins = {name: make(name, shard_rows=(20,), sizes=(4,), key_prefix=f"{name}/") for name in "ab"}
    keys = keys_of(loader(twins, 20, weights=(1, 1)), 2)
    orders = [[key[2:] for key in keys if key[0] == name] for name in "ab"]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_the_order_of_the_list_of_stores_does_not_matter(made: dict[str, Made]) -> None:
    stores = opened(made)
    weights = {"b": 1.0, "a": 1.0}
    turned = Mixture({"b": stores["b"], "a": stores["a"]}, weights).loader(5)
    assert keys_of(turned, 9) == keys_of(loader(made, 5, weights=(2, 2)), 9)


@pytest.mark.parametrize("window", [None, 1])
def test_the_sequence_is_the_same_after_2_then_1_then_3_processes_with_removals(
    made: dict[str, Made], window: int | None
) -> None:
    options: dict[str, Any] = {"seed": 9, "shuffle_window_shards": window, "images": [4]}
    straight = keys_of(loader(made, 6, **options), 12)
    gone = {straight[13], straight[14], straight[30], straight[31], straight[32], straight[33], straight[40]}
    seen: list[str] = []
    sizes: list[int] = []
    state = None
    for world_size, steps in ((2, 2), (1, 3), (3, 7)):
        ranks = [
            loader(made, 6 // world_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)
        ]
        for mixed in ranks:
            if state is not None:
                mixed.load_state_dict(json.loads(json.dumps(check_state(state))))
        for _, batches in zip(range(steps), zip(*ranks, strict=True), strict=False):
            seen += [key for batch in batches for key in batch["keys"]]
            sizes.append(ranks[0].global_size)
            assert {mixed.global_size for mixed in ranks} == {sum(len(batch["keys"]) for batch in batches)}
        state = ranks[0].state_dict()
        assert all(mixed.state_dict() == state for mixed in ranks)
        if world_size == 2:
            for name in made:
                remove(made[name].path, key=sorted(key for key in gone if key[0] == name))
    assert seen == straight[:12] + [key for key in straight[12:] if key not in gone]
    assert (sum(sizes), min(sizes) < max(sizes)) == (len(seen), True)
    assert consumed(state or {}) == 72


def test_a_batch_that_was_only_skipped_counts_as_consumed(made: dict[str, Made]) -> None:
    mixed, other = loader(made, images=[4]), loader(made, images=[4])
    assert keys_of(mixed, 3)
    for _ in range(3):
        skipped = other.skip()
        assert (skipped["keys"], skipped["images"][4].shape) == ([], (0, 3, 4, 4))
    assert other.state_dict() == mixed.state_dict()
    assert (other.global_size, keys_of(other, 1)) == (4, keys_of(mixed, 1))


def test_changed_weights_are_recorded_and_read_nothing_again_before_its_epoch_ends(made: dict[str, Made]) -> None:
    mixed = loader(made, 10)
    before = keys_of(mixed, 2)
    changed = loader(made, 10, weights=(0.2, 0.8))
    changed.load_state_dict(mixed.state_dict())
    after = keys_of(changed, 1)
    assert Counter(key[0] for key in after) == {"a": 2, "b": 8}
    for name, one in made.items():
        own = [key for key in before + after if key[0] == name][: len(one.keys)]
        assert len(set(own)) == len(own)
    state = changed.state_dict()
    assert state["segments"] == [
        {"position": 0, "weights": {"a": 0.7, "b": 0.3}},
        {"position": 20, "weights": {"a": 0.2, "b": 0.8}},
    ]
    again = loader(made, 10, weights=(1, 4))  # the same shares in other numbers
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert keys_of(again, 3) == keys_of(changed, 3)


def test_a_store_may_join_leave_and_come_back_where_it_was(made: dict[str, Made]) -> None:
    stores = opened(made)
    alone = Mixture({"a": stores["a"]}, {"a": 1}).loader(5)
    keys = keys_of(alone, 1)
    both = loader(made, 5, weights=(1, 1))
    both.load_state_dict(alone.state_dict())
    keys += keys_of(both, 2)
    assert {key[0] for key in keys[5:]} == {"a", "b"}
    alone = Mixture({"a": stores["a"]}, {"a": 1}).loader(5)
    alone.load_state_dict(both.state_dict())
    keys += keys_of(alone, 1)
    assert {key[0] for key in keys[15:]} == {"a"}
    back = loader(made, 5, weights=(1, 1))
    back.load_state_dict(alone.state_dict())
    keys += keys_of(back, 1)
    for name in made:
        own = [key for key in keys if key[0] == name]
        assert len(set(own)) == len(own), "no sample was read twice within its epoch"
    assert [segment["position"] for segment in back.state_dict()["segments"]] == [0, 5, 15, 20]


def test_a_training_of_one_store_goes_on_in_its_order_within_a_mixture(made: dict[str, Made]) -> None:
    store = opened(made)["a"]
    single = store.loader(5, seed=3)
    first = [key for batch in islice(single, 2) for key in batch["keys"]]
    mixed = loader(made, 5, seed=3, weights=(1, 0))
    mixed.load_state_dict(as_mixture_state("a", single.state_dict()))
    assert first + keys_of(mixed, 2) == [key for batch in islice(store.loader(5, seed=3), 4) for key in batch["keys"]]
    assert mixed.state_dict()["position"] == 20


def test_a_store_of_weight_0_is_not_read(made: dict[str, Made]) -> None:
    assert {key[0] for key in keys_of(loader(made, 5, weights=(0, 1)), 8)} == {"b"}


def changed_state(state: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    state = json.loads(json.dumps(state))
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(seed=5), "seed 5, this loader has 0"),
        (lambda s: s["stores"]["a"].update(num_samples=24), "store a: .*num_samples 24, this loader has 23"),
        (lambda s: s["stores"]["a"].update(shuffle=False), "store a: .*shuffle False"),
        (lambda s: s["stores"]["b"].update(position="3"), "store b: .*position '3'"),
        (lambda s: s["stores"]["b"].update(num_samples=0, position=0), "store b: .*lacks num_samples"),
        (lambda s: s.update(position=21), "position 21, but 20 samples"),
        (lambda s: s.update(position=-1), "position -1"),
        (lambda s: s.update(stores=[]), "lacks stores"),
        (lambda s: s.update(segments=[]), "lacks stores or segments"),
        (lambda s: s["segments"][0].update(position=3), r"segments from \[3\]"),
        (lambda s: s["segments"][0].update(weights={"c": 1}), "which must have position and weights of its stores"),
        (lambda s: s["segments"][0].update(weights={"a": "x"}), "could not convert|must be numbers"),
        (lambda s: s["segments"][0].update(weights={"a": 0}), "must not all be 0"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    made: dict[str, Made], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    mixed = loader(made, 10)
    keys_of(mixed, 2)
    state = changed_state(mixed.state_dict(), change)
    with pytest.raises(ValueError, match=message):
        loader(made, 10).load_state_dict(state)


def test_the_sequence_of_a_mixture_is_frozen(made: dict[str, Made]) -> None:
    """A resumed run relies on it; a change here breaks every checkpoint of a mixture."""
    keys = keys_of(loader(made, 10, seed=3), 1)
    assert [key for key in keys if key[0] == "a"] == [
        f"a/{row}" for row in ("001-002", "000-003", "000-002", "001-003", "001-009", "001-001", "000-009")
    ]
    assert [(place, key) for place, key in enumerate(keys) if key[0] == "b"] == [
        (1, "b/000-000"),
        (5, "b/001-000"),
        (8, "b/000-002"),
    ]


def bucketed(make: Make) -> dict[str, Made]:
    return {
        name: make(f"wide-{name}", shard_rows=rows, sizes=(64,), key_prefix=f"{name}/", seed=ord(name), buckets=True)
        for name, rows in SIZES.items()
    }


def test_with_buckets_each_global_batch_is_of_one_store_and_one_shape(make: Make) -> None:
    made = bucketed(make)
    mixed = loader(made, 2, images=[64])
    turns, keys, shapes = [], [], set()
    for batch in islice(mixed, 40):
        (name,) = {key[0] for key in batch["keys"]}
        turns.append(name)
        keys += batch["keys"]
        shapes.add(tuple(batch["images"][64].shape[2:]))
    assert [turns[start : start + 10].count("a") for start in range(0, 40, 10)] == [7] * 4
    assert len(shapes) == 3
    for name, one in made.items():
        own = [key for key in keys if key[0] == name]
        assert sorted(own[: len(one.keys)]) == sorted(one.keys)


def test_with_buckets_other_world_sizes_go_on_with_the_same_batches(make: Make) -> None:
    made = bucketed(make)
    whole = [batch["keys"] for batch in islice(loader(made, 6, images=[64]), 30)]
    found, state = [], None
    for world_size, batches in ((2, 7), (1, 8), (3, 15)):
        ranks = [loader(made, 6 // world_size, images=[64], rank=r, world_size=world_size) for r in range(world_size)]
        for rank in ranks if state is not None else ():
            rank.load_state_dict(check_state(state))
        parts = [[batch["keys"] for batch in islice(rank, batches)] for rank in ranks]
        found += [[key for part in batch for key in part] for batch in zip(*parts, strict=True)]
        (state,) = {json.dumps(rank.state_dict()) for rank in ranks}
        state = json.loads(state)
    assert found == whole


def test_with_buckets_other_weights_begin_where_the_state_is(make: Make) -> None:
    made = bucketed(make)
    first = loader(made, 2, images=[64])
    before = keys_of(first, 9)
    other = loader(made, 2, (0, 1), images=[64])
    other.load_state_dict(first.state_dict())
    after = keys_of(other, 4)
    assert {key[0] for key in after} == {"b"}
    own = [key for key in before if key[0] == "b"] + after
    assert len(set(own[: len(made["b"].keys)])) == len(made["b"].keys)
    assert [segment["position"] for segment in other.state_dict()["segments"]] == [0, len(before)]


def test_stores_of_other_buckets_are_refused_by_the_setting_and_both_values(make: Make) -> None:
    stores = opened(bucketed(make))
    for name, base in (("a", 64), ("b", 32)):
        group = stores[name].manifest.images[64]
        stores[name].manifest.images[64] = replace(group, shapes=scaled(bucket_shapes(base), base, 64))
    says = r"store b: its images-64 have other .* than those of store a: images\.aspect_base_px: 64 -> 32; mix"
    with pytest.raises(ValueError, match=says):
        Mixture(stores, {"a": 1, "b": 1}).loader(2, images=[64])
    assert keys_of(Mixture(stores, {"a": 1, "b": 1}).loader(2), 2), "without images they go together"
