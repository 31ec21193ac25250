"""The order of buckets: each sample once an epoch, batches of one bucket, and the same order however it is cut."""

import numpy as np
import pytest

from imagen_core.store.read.bucketed import BucketedOrder, Cut, check_bucket_state

NUM_BUCKETS = 4
Batch = tuple[int, list[int]]


def make_buckets(count: int) -> np.ndarray:
    """Most samples in bucket 1, none in bucket 3."""
    return np.random.default_rng(5).choice(NUM_BUCKETS, count, p=[0.2, 0.7, 0.1, 0.0]).astype(np.uint8)


def make_order(count: int = 500, *, window: int = 0, seed: int = 3, shuffle: bool = True) -> BucketedOrder:
    """Shards of 50 samples, the last one smaller."""
    bounds = np.unique([*range(0, count, 50), count])
    return BucketedOrder(make_buckets(count), NUM_BUCKETS, bounds=bounds, window=window, seed=seed, shuffle=shuffle)


def epoch_of(order: BucketedOrder, cut: Cut, epoch: int = 0, position: int | None = None) -> list[Batch]:
    """The batches from a position to the end of the epoch."""
    found: list[Batch] = []
    at = sum(cut.starts) if position is None else position
    while (following := order.next_batch(epoch, cut, at))[1]:
        bucket, size = following
        found.append((bucket, order.indices(epoch, cut, np.arange(at, at + size)).tolist()))
        at += size
    return found


@pytest.mark.parametrize(("window", "batch_size"), [(0, 7), (0, 1000), (1, 7), (3, 64), (100, 7), (3, 1)])
def test_every_sample_comes_once_in_a_batch_of_its_bucket(window: int, batch_size: int) -> None:
    order, buckets = make_order(150, window=window), make_buckets(150)
    for epoch in (0, 1):
        batches = epoch_of(order, order.uncut(batch_size), epoch)
        assert sorted(index for _, batch in batches for index in batch) == list(range(150))
        assert all((buckets[batch] == bucket).all() for bucket, batch in batches)
        partial = [len(batch) < batch_size for _, batch in batches]
        assert sum(partial) <= 3
        assert partial == sorted(partial), "the smaller ones come last"
        assert len(batches) == order.num_batches(batch_size, full_only=False)
        assert partial.count(False) == order.num_batches(batch_size, full_only=True)


@pytest.mark.parametrize("window", [0, 3])
def test_epochs_and_seeds_have_orders_of_their_own(window: int) -> None:
    first, again, other = (make_order(window=window, seed=seed) for seed in (3, 3, 4))
    cut = first.uncut(16)
    assert epoch_of(first, cut) == epoch_of(again, cut)
    orders = [epoch_of(first, cut), epoch_of(first, cut, 1), epoch_of(other, cut)]
    assert len({str(batches) for batches in orders}) == 3
    assert len({tuple(bucket for bucket, _ in batches) for batches in orders}) == 3, "batches are shuffled too"


def test_the_batches_of_the_buckets_are_mixed_and_samples_uniform() -> None:
    order, cut = make_order(2000), make_order(2000).uncut(8)
    batches = epoch_of(order, cut)
    labels = [bucket for bucket, _ in batches]
    assert 0.6 < labels[:100].count(1) / 100 < 0.8, "as in the whole epoch"
    assert {order.next_batch(epoch, cut, 0)[0] for epoch in range(60)} == {0, 1, 2}
    members = np.flatnonzero(make_buckets(2000) == 1)
    seen = [index for bucket, batch in batches if bucket == 1 for index in batch]
    assert abs(np.corrcoef(members, seen)[0, 1]) < 0.1


def test_without_shuffle_buckets_come_one_after_another_in_the_stores_order() -> None:
    order, buckets = make_order(100, shuffle=False), make_buckets(100)
    batches = epoch_of(order, order.uncut(10))
    full = [index for _, batch in batches if len(batch) == 10 for index in batch]
    assert full == [
        i for b in range(3) for i in np.flatnonzero(buckets == b).tolist()[: (buckets == b).sum() // 10 * 10]
    ]
    assert epoch_of(order, order.uncut(10), 7) == batches


def test_with_windows_few_shards_are_read_at_a_time() -> None:
    order = make_order(1000, window=2)
    batches = epoch_of(order, order.uncut(8))
    spread = [len({index // 50 for index in batch}) for bucket, batch in batches if bucket == 1 and len(batch) == 8]
    assert max(spread) <= 4, "of two windows of 2 shards at most"
    assert np.mean(spread) < 2.5
    shards = [index // 50 for bucket, batch in batches if bucket == 1 for index in batch]
    assert len(set(shards)) == 20
    for shard in set(shards):
        places = [place for place, each in enumerate(shards) if each == shard]
        assert max(places) - min(places) <= 100, "the samples of a shard come close together"


@pytest.mark.parametrize("window", [0, 3])
def test_an_epoch_goes_on_with_batches_of_another_size_without_losing_or_repeating_a_sample(window: int) -> None:
    order, buckets = make_order(window=window), make_buckets(500)
    cut = order.uncut(16)
    seen, position = [], 0
    for batch_size, count in ((16, 9), (12, 7), (5, 8), (16, 1000)):
        cut = Cut(batch_size, order.consumed(0, cut, position))
        for bucket, batch in epoch_of(order, cut, position=position)[:count]:
            assert (buckets[batch] == bucket).all()
            seen += batch
            position += len(batch)
    assert sorted(seen) == list(range(500))


def test_a_position_within_a_batch_is_refused() -> None:
    order = make_order()
    with pytest.raises(ValueError, match="position 5 of epoch 0: no batch"):
        order.consumed(0, order.uncut(16), 5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"starts": [1]}, "a start for each ratio"),
        ({"starts": [4, 4]}, "of 7 samples in all at most"),
        ({"starts": [-1, 0]}, "0 or more"),
        ({"starts": "ab"}, "0 or more"),
        ({"batch_size": True}, "positive integers"),
        ({"ratios": [[1, 1], [2]]}, "positive integers"),
        ({"ratios": 3}, "positive integers"),
    ],
)
def test_a_damaged_state_of_buckets_is_refused(changes: dict[str, object], says: str) -> None:
    good = {"ratios": [[1, 1], [3, 2]], "batch_size": 4, "starts": [0, 3]}
    check_bucket_state(good, 7)
    with pytest.raises(ValueError, match=says):
        check_bucket_state(good | changes, 7)
    with pytest.raises(ValueError, match="a mapping with ratios"):
        check_bucket_state([], 7)
