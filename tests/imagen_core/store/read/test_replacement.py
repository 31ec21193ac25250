"""Samples drawn with replacement: uniform and independent, and the same however the loader is run."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest

from imagen_core import store as st
from imagen_core.store.read.order import resample
from tests.imagen_core.store.handmade_store import Made

Make = Callable[..., Made]
ORDERS: list[dict[str, Any]] = [{}, {"shuffle_window_shards": 2}, {"images": [8]}]
"""All samples, windows, and buckets."""


@pytest.fixture
def made(make: Make) -> Made:
    return make(shard_rows=(11, 9, 12, 5), buckets=True)


def loaders(made: Made, world_size: int, **options: Any) -> list[Any]:
    store, size = st.Store.open(made.path), 6 // world_size
    each = [{"rank": rank, "world_size": world_size} for rank in range(world_size)]
    return [store.loader(size, captions=True, seed=1, replacement=True, **ranks, **options) for ranks in each]


def joined(ranks: list[Any]) -> list[list[tuple[str, str]]]:
    """Keys and captions of each global batch of what is left of an epoch."""
    return [
        [pair for batch in batches for pair in zip(batch["keys"], batch["captions"], strict=True)]
        for batches in zip(*ranks, strict=True)
    ]


def test_draws_are_uniform_and_independent() -> None:
    draws = resample(np.arange(50_000), 10, key=3)
    counts = np.bincount(draws, minlength=10)
    assert np.abs(counts - 5000).max() < 5 * 5000**0.5
    pairs = np.bincount(draws[:-1] * 10 + draws[1:], minlength=100)
    assert ((pairs - 500) ** 2 / 500).sum() == pytest.approx(99, abs=60), "chi-square with 99 degrees of freedom"
    missing = len(set(range(10_000)) - set(resample(np.arange(10_000), 10_000, key=4).tolist()))
    assert missing / 10_000 == pytest.approx(1 / np.e, abs=0.02), "as many as of n draws out of n"
    parts = [resample(np.arange(first, first + 100), 10, key=3) for first in range(0, 1000, 100)]
    assert np.array_equal(np.concatenate(parts), draws[:1000])


@pytest.mark.parametrize("options", ORDERS)
def test_an_epoch_is_as_long_but_samples_come_again_in_any_epoch(made: Made, options: dict[str, Any]) -> None:
    (loader,) = loaders(made, 1, **options)
    counts = [Counter(key for batch in loader for key in batch["keys"]) for _ in range(30)]
    assert all(found.total() == 37 for found in counts)
    assert max(max(found.values()) for found in counts) > 1
    assert counts[0] != counts[1]
    total = sum(counts, Counter[str]())
    assert set(total) == set(made.keys)
    assert max(total.values()) < 60, "30 on average"


@pytest.mark.parametrize("options", ORDERS)
def test_it_goes_on_the_same_with_2_then_1_then_3_processes(made: Made, options: dict[str, Any]) -> None:
    (straight,) = loaders(made, 1, **options)
    expected = [batch for _ in range(3) for batch in joined([straight])]
    seen: list[list[tuple[str, str]]] = []
    state = None
    for world_size in (2, 1, 3):
        ranks = loaders(made, world_size, **options)
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(json.loads(json.dumps(state)))
        seen += joined([islice(rank, 2) for rank in ranks])
        state = ranks[0].state_dict()
    assert seen == expected[: len(seen)]
    assert len(seen) == 6


def test_a_sample_that_comes_again_may_have_another_caption(make: Make) -> None:
    made = make(shard_rows=(40,), num_captions=4)
    loader = st.Store.open(made.path).loader(40, captions=True, replacement=True)
    (batch,) = loader
    taken: dict[str, set[str]] = {}
    for key, caption in zip(batch["keys"], batch["captions"], strict=True):
        taken.setdefault(key, set()).add(caption)
    assert any(len(captions) > 1 for captions in taken.values())


def test_a_state_without_replacement_is_what_it_was(made: Made) -> None:
    store = st.Store.open(made.path)
    assert "replacement" not in store.loader(2).state_dict()
    with pytest.raises(ValueError, match="replacement 0, this loader has True"):
        store.loader(2, replacement=True).load_state_dict(store.loader(2).state_dict())


def test_replacement_without_shuffling_is_refused(made: Made) -> None:
    with pytest.raises(ValueError, match="replacement goes with shuffle"):
        st.Store.open(made.path).loader(2, replacement=True, shuffle=False)
