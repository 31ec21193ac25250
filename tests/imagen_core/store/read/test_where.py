"""`Store.where`: a store of the samples for which a condition is true, with an order and a state of its own."""

import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sqlglot")

from imagen_core import store as st
from imagen_core.conditions import ConditionError
from imagen_core.store.read.places import AllPlaces, ChosenPlaces
from tests.imagen_core.store.handmade_store import Made, remove

Make = Callable[..., Made]
CHOSEN = ["000-002", "000-003", "000-004", "001-002", "002-002", "002-003"]
"""Keys of the samples whose height, 480 + row, is at least 482."""


def keys_of(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def test_the_chosen_samples_are_the_store(make: Make) -> None:
    made = make()
    store = st.Store.open(made.path)
    chosen = store.where("height >= 482")
    assert (len(chosen), len(store)) == (6, 12)
    assert [sample.key for sample in chosen] == CHOSEN
    assert chosen[-1].key == "002-003"
    assert [sample.key for sample in chosen.where("key LIKE '00_-002'")] == ["000-002", "001-002", "002-002"]
    assert [sample.key for sample in pickle.loads(pickle.dumps(chosen))] == CHOSEN
    assert len(store.where("height > 500")) == 0


@pytest.mark.parametrize(
    ("condition", "count"),
    [
        ("url IS NULL", 5),
        ("label IS NULL", 12),
        ("label = 3", 0),
        ("NOT label = 3", 0),
        ("transcription IS NOT NULL", 0),
    ],
)
def test_null_follows_sql(make: Make, condition: str, count: int) -> None:
    assert len(st.Store.open(make().path).where(condition)) == count


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("score > 1", "has no column 'score'; it has: key, url, sha256, width, height, label, transcription"),
        ("height >", "'height >' is no expression of SQL"),
        ("height = 'tall'", "does not fit the columns"),
        ("height", "does not fit the columns"),
        ("1 = 1", "names no column"),
    ],
)
def test_a_condition_that_does_not_fit_is_refused(make: Make, condition: str, message: str) -> None:
    store = st.Store.open(make().path)
    with pytest.raises(ConditionError, match=message):
        store.where(condition)
    with pytest.raises(ValueError, match=r"^where: "):
        store.loader(batch_size=1, where=condition)


@pytest.mark.parametrize("window", [None, 2])
def test_an_epoch_is_the_chosen_samples_once_in_an_order_that_resumes(make: Make, window: int | None) -> None:
    store = st.Store.open(make(shard_rows=(20, 17, 9), sizes=(4,)).path)
    options: dict[str, Any] = {"seed": 9, "where": "height >= 485", "shuffle_window_shards": window}
    expected = [sample.key for sample in store.where("height >= 485")]
    straight = keys_of(store.loader(batch_size=1, **options))
    assert sorted(straight) == expected
    assert straight != expected
    seen: list[str] = []
    state = None
    for world_size, batch_size, steps in ((2, 3, 2), (1, 5, 2), (3, 2, 99)):
        ranks = range(world_size)
        loaders = [store.loader(batch_size=batch_size, rank=r, world_size=world_size, **options) for r in ranks]
        for loader in loaders if state else ():
            loader.load_state_dict(json.loads(json.dumps(state)))
        for _, batches in zip(range(steps), zip(*loaders, strict=True), strict=False):
            seen += keys_of(batches)
            state = loaders[0].state_dict()
    assert seen == straight


def test_ranges_count_the_chosen_samples(make: Make) -> None:
    store = st.Store.open(make().path)
    loader = store.loader(batch_size=4, shuffle=False, where="height >= 482", samples=range(1, 5))
    assert keys_of(loader) == CHOSEN[1:5]
    with pytest.raises(ValueError, match="within 6 samples"):
        store.loader(batch_size=4, where="height >= 482", samples=range(12))


def test_the_state_of_another_condition_is_refused(make: Make) -> None:
    store = st.Store.open(make().path)
    state = store.loader(batch_size=2, where="height >= 482").state_dict()
    store.loader(batch_size=3, where="NOT height < 482").load_state_dict(state)
    for other in ("height = 480 OR height = 481", "height >= 481", None):
        with pytest.raises(ValueError, match="another condition"):
            store.loader(batch_size=2, where=other).load_state_dict(state)
    with pytest.raises(ValueError, match="another condition"):
        store.loader(batch_size=2, where="height > 1").load_state_dict(store.loader(batch_size=2).state_dict())


def test_a_state_from_before_a_removal_keeps_its_order(make: Make) -> None:
    made = make()
    options: dict[str, Any] = {"batch_size": 2, "where": "height >= 482", "seed": 4}
    before = st.Store.open(made.path).loader(**options)
    order = keys_of(before)
    gone = order[4]
    loader = st.Store.open(made.path).loader(**options)
    next(iter(loader))
    remove(made.path, key=[gone, "000-000"])
    resumed = st.Store.open(made.path).loader(**options)
    resumed.load_state_dict(loader.state_dict())
    assert keys_of(resumed) == [key for key in order[2:] if key != gone]
    assert len(keys_of(st.Store.open(made.path).loader(**options))) == 5


def test_only_the_named_columns_are_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = st.Store.open(make().path)
    read: list[list[str]] = []
    columns = st.Store.__mro__[1].where.__globals__["OpenShard"].columns

    def noted(self: Any, names: Any) -> Any:
        read.append(list(names))
        return columns(self, names)

    monkeypatch.setattr("imagen_core.store.read.reader.OpenShard.columns", noted)
    store.where("height >= 482 AND width > 1")
    assert read == [["height", "width"]] * 3


@pytest.mark.parametrize("excluded", [{}, {0: [1], 2: [0, 2]}])
def test_chosen_places_of_all_rows_are_all_places(excluded: dict[int, list[int]]) -> None:
    rows = np.array([4, 0, 3, 2])
    every = AllPlaces(rows, excluded)
    chosen = ChosenPlaces(rows, excluded, np.ones(9, np.bool_))
    assert len(chosen) == len(every)
    assert [chosen.locate(i) for i in range(len(every))] == [every.locate(i) for i in range(len(every))]
    for part in (range(len(every)), range(1, 4)):
        np.testing.assert_array_equal(chosen.bounds(part), every.bounds(part))
