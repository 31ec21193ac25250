"""Loader of aspect-ratio buckets: batches of one shape, the right pixels, and the same order however it is run."""

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from imagen_core import store as st
from tests.imagen_core.store.handmade_store import Made, bucket_list, remove, samples_files

Make = Callable[..., Made]
ROWS = (11, 9, 12, 5)


@pytest.fixture
def made(make: Make) -> Made:
    return make(shard_rows=ROWS, buckets=True, num_captions=1)


def loaders(made: Made, world_size: int, global_size: int = 6, **options: Any) -> list[Any]:
    store = st.Store.open(made.path)
    size = global_size // world_size
    return [
        store.loader(size, [8, 4], text="t5", seed=1, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def joined(ranks: list[Any]) -> list[list[str]]:
    """Keys of each global batch of what is left of an epoch."""
    return [[key for batch in batches for key in batch["keys"]] for batches in zip(*ranks, strict=True)]


@pytest.mark.parametrize("codec", ["raw", "png"])
def test_a_batch_has_the_images_of_one_bucket(make: Make, store_format: st.StoreFormat, codec: st.Codec) -> None:
    made = make(store_format=store_format, codec=codec, buckets=True, excluded={0: [1], 2: [0, 3]})
    seen, shapes = [], set()
    for batch in loaders(made, 1, 3)[0]:
        shape = batch["images"][8].shape[2:]
        assert tuple(shape) in bucket_list(8)
        assert batch["images"][4].shape == (len(batch["keys"]), 3, shape[0] // 2, shape[1] // 2)
        for k, key in enumerate(batch["keys"]):
            for size in (8, 4):
                stored = torch.from_numpy(made.images[size][made.keys.index(key)])
                assert torch.equal(batch["images"][size][k].permute(1, 2, 0), stored)
        seen += batch["keys"]
        shapes.add(tuple(shape))
    assert sorted(seen) == sorted(made.keys)
    assert len(shapes) == 3


@pytest.mark.parametrize("window", [None, 2])
def test_each_sample_comes_once_and_the_world_size_changes_nothing(made: Made, window: int | None) -> None:
    one, two, three = (joined(loaders(made, world, shuffle_window_shards=window)) for world in (1, 2, 3))
    assert one == two == three
    assert sorted(key for batch in one for key in batch) == sorted(made.keys)
    assert len(one) == len(loaders(made, 1, shuffle_window_shards=window)[0])


@pytest.mark.parametrize("window", [None, 2])
def test_an_epoch_goes_on_the_same_with_2_then_1_then_3_processes(made: Made, window: int | None) -> None:
    full = loaders(made, 1, shuffle_window_shards=window)[0]
    expected = [batch["keys"] for _ in range(3) for batch in full]
    seen: list[list[str]] = []
    state: dict[str, Any] | None = None
    for world, count in ((2, 2), (1, 3), (3, 6), (2, 7)):
        ranks = loaders(made, world, shuffle_window_shards=window)
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        left = count
        while left:
            batches = list(islice(zip(*ranks, strict=True), left))
            seen += [[key for batch in each for key in batch["keys"]] for each in batches]
            left -= len(batches)
        states = [json.loads(json.dumps(rank.state_dict())) for rank in ranks]
        assert all(each == states[0] for each in states)
        state = states[0]
    assert seen == expected[: len(seen)]


def test_another_batch_size_reads_the_rest_of_the_epoch(made: Made) -> None:
    first = loaders(made, 1)[0]
    seen = [key for batch in islice(first, 3) for key in batch["keys"]]
    second = loaders(made, 1, 4)[0]
    second.load_state_dict(first.state_dict())
    seen += [key for batch in islice(second, 2) for key in batch["keys"]]
    third = loaders(made, 2, 4)
    for rank in third:
        rank.load_state_dict(second.state_dict())
    assert third[0].state_dict() == second.state_dict(), "the same cut"
    seen += [key for batch in joined(third) for key in batch]
    assert sorted(seen) == sorted(made.keys)
    assert joined(third) == joined(loaders_at(made, 4, epoch=1)), "the next epoch begins as if nothing had happened"


def loaders_at(made: Made, global_size: int, epoch: int) -> list[Any]:
    (loader,) = loaders(made, 1, global_size)
    for _ in range(epoch):
        list(loader)
    return [loader]


def test_a_batch_shrinks_by_removed_samples(made: Made) -> None:
    before = loaders(made, 1)[0]
    list(islice(before, 1))
    state = before.state_dict()
    expected = [batch["keys"] for batch in before]
    gone = [expected[0][0], expected[3][1]]
    remove(made.path, key=gone)
    after = loaders(made, 1)[0]
    after.load_state_dict(state)
    assert [batch["keys"] for batch in after] == [[key for key in keys if key not in gone] for keys in expected]


def test_a_range_of_samples_is_in_batches_of_its_buckets(made: Made) -> None:
    store = st.Store.open(made.path)
    batches = list(store.loader(3, [8], samples=range(4, 30)))
    assert sorted(key for batch in batches for key in batch["keys"]) == sorted(made.keys[4:30])
    ordered = list(store.loader(30, [8], samples=range(4, 30), shuffle=False))
    assert [tuple(batch["images"][8].shape[2:]) for batch in ordered] == list(bucket_list(8))
    assert all(batch["keys"] == sorted(batch["keys"]) for batch in ordered)


def test_an_empty_part_of_a_batch_has_its_buckets_shape(make: Make) -> None:
    made = make(shard_rows=(3,), buckets=True, num_captions=1)
    ranks = loaders(made, 2, 4)
    for batches in zip(*ranks, strict=True):
        first, second = (batch["images"][8] for batch in batches)
        assert (len(first), len(second)) == (0, 1)
        assert first.shape[1:] == second.shape[1:]
    ranks = loaders(made, 2, 4)
    assert ranks[0].skip()["images"][8].shape[1:] == next(iter(ranks[1]))["images"][8].shape[1:]


def test_drop_last_leaves_out_at_most_2_percent(make: Make) -> None:
    made = make(shard_rows=(151,), buckets=True, num_captions=1, sizes=(4,))
    store = st.Store.open(made.path)
    loader = store.loader(5, [4], drop_last=True)
    sizes = [len(batch["keys"]) for batch in loader]
    assert sizes == [5] * 30 == [5] * len(loader)
    with pytest.raises(ValueError, match=r"drop_last would leave out 31 of 151 samples.*leave drop_last off"):
        store.loader(20, [4], drop_last=True)


def test_crops_fit_the_buckets(made: Made) -> None:
    store = st.Store.open(made.path)
    ends = np.array([[0.999, 0.999]])
    crop = st.Crop(4, lambda counters: np.repeat(ends, len(counters), axis=0))
    for batch in store.loader(6, [8, 4], crop=crop):
        for k, key in enumerate(batch["keys"]):
            full = {size: torch.from_numpy(made.images[size][made.keys.index(key)]) for size in (8, 4)}
            assert torch.equal(batch["images"][8][k].permute(1, 2, 0), full[8][-4:, -4:])
            assert torch.equal(batch["images"][4][k].permute(1, 2, 0), full[4][-2:, -2:])
    with pytest.raises(ValueError, match="crop of 8 px does not fit images of 10 x 6 px, an aspect-ratio bucket"):
        store.loader(6, [8], crop=st.Crop(8, crop.places))


def test_states_of_squares_and_of_buckets_are_not_taken_for_each_other(made: Made, make: Make) -> None:
    square = st.Store.open(make("square", shard_rows=ROWS, num_captions=1).path).loader(6, [8], seed=1)
    assert "buckets" not in square.state_dict()
    (buckets,) = loaders(made, 1)
    with pytest.raises(ValueError, match=r"than this loader: images\.aspect: square -> buckets: the order"):
        buckets.load_state_dict(square.state_dict())
    with pytest.raises(ValueError, match=r"than this loader: images\.aspect: buckets -> square: the order"):
        square.load_state_dict(buckets.state_dict())
    with pytest.raises(ValueError, match="no batch"):
        buckets.load_state_dict(buckets.state_dict() | {"position": 1})


def test_without_images_the_order_is_that_of_squares(made: Made, make: Make) -> None:
    square = make("square", shard_rows=ROWS, num_captions=1)
    stores = (st.Store.open(each.path) for each in (made, square))
    first, second = ([batch["keys"] for batch in store.loader(6, text="t5")] for store in stores)
    assert first == second


def test_erased_samples_keep_their_place_in_the_order(made: Made) -> None:
    """The content of removed samples is erased after the state was taken: the others come in the same batches."""
    before = loaders(made, 1)[0]
    list(islice(before, 1))
    state = before.state_dict()
    expected = [batch["keys"] for batch in before]
    gone = [expected[0][0], expected[0][1], expected[3][1]]
    folder = remove(made.path, key=gone)
    manifest, removals = st.load_manifest(folder), st.load_removals(folder)
    new = {}
    for index, samples, _ in samples_files(folder):
        rows = st.removed_rows(removals, index, samples)
        if not rows:
            continue
        erased = st.ErasedShard.of(index, samples, rows, manifest.images[8].shapes)
        for row in rows:
            assert (erased.samples[row].height, erased.samples[row].width) in {(5, 3), (1, 1), (3, 5)}
        for name, entry in manifest.shard(index).files.items():
            path = st.shard_path(name, index, manifest.groups[name].format, 1)
            count = erased.write(manifest.groups[name], folder.path(entry.path), made.path / path)
            data = (made.path / path).read_bytes()
            new[index, name] = st.FileEntry(path, len(data), sha256(data).hexdigest(), count)
    st.rewrite_manifest(folder, new)
    report = st.verify_store(made.path)
    assert report.ok, report.problems
    after = loaders(made, 1)[0]
    after.load_state_dict(state)
    assert [batch["keys"] for batch in after] == [[key for key in keys if key not in gone] for keys in expected]


def test_seek_goes_to_the_end_of_a_batch_and_nowhere_else(made: Made) -> None:
    (whole,) = loaders(made, 1)
    expected = [batch["keys"] for _ in range(2) for batch in whole]
    (loader,), (cut,) = loaders(made, 1), loaders(made, 1, 4)
    list(islice(cut, 3))
    loader.load_state_dict(cut.state_dict())  # the rest of this epoch is cut in another way
    assert loader.state_dict()["buckets"]["starts"] != [0, 0, 0]
    done = sum(map(len, expected[:2]))
    loader.seek(done)
    assert loader.state_dict()["buckets"]["starts"] == [0, 0, 0]
    assert [batch["keys"] for batch in islice(loader, 2)] == expected[2:4]
    loader.seek(loader.num_samples)
    assert [batch["keys"] for batch in islice(loader, 2)] == expected[len(whole) : len(whole) + 2]
    with pytest.raises(ValueError, match=r"position 1 of epoch 0: no batch of these aspect-ratio buckets ends there"):
        loader.seek(1)


def test_sizes_of_other_buckets_are_refused_by_the_setting(made: Made) -> None:
    store = st.Store.open(made.path)
    store.manifest.images[4] = replace(store.manifest.images[4], shapes=())
    with pytest.raises(
        ValueError, match=r"images-8 have different .* in one batch: images\.aspect: square -> buckets"
    ):
        store.loader(2, [8, 4])
