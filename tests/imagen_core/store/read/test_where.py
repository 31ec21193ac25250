"""`Store.where`: a store of the samples for which a condition is true, with an order and a state of its own."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sqlglot")

from imagen_core import store as st
from imagen_core.conditions import ConditionError
from imagen_core.store.read.places import AllPlaces, ChosenPlaces
from tests.imagen_core.store.arrays_added import add_arrays, values_of
from tests.imagen_core.store.caption_sets_added import add_caption_sets
from tests.imagen_core.store.handmade_store import Made, make_store, remove

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


SHORT = {0: ["one"], 1: [], 2: ["one", "two"], 3: ["empty"]}


@pytest.fixture
def computed(tmp_path: Path, store_format: st.StoreFormat) -> st.Store:
    """A store with a further set of captions, "empty" of which was not encoded, and arrays of several shapes."""
    root = tmp_path / "computed"
    make_store(root, shard_rows=(5, 3), sizes=(), store_format=store_format, excluded={0: [4]})
    add_caption_sets(root, {"short": lambda shard, row: SHORT[row % 4]}, {"long": 1.0, "short": 1.0})
    captions = {"captions": json.loads((root / "manifest.json").read_bytes())["captions"]}
    for name, spec in (
        ("score", st.ArraySpec("float32")),
        ("has-text", st.ArraySpec("bool")),
        ("clip_score.short", st.ArraySpec("float32", (None,))),
        ("mask", st.ArraySpec("bool", (None, None))),
    ):
        add_arrays(root, name, spec, values_of(spec, 8), store_format)
    header = json.loads((root / "manifest.json").read_bytes())
    st.write_manifest(root / "manifest.json", {"groups": header["groups"], **captions}, header["shards"])
    return st.Store.open(root)


def test_lengths_of_captions_can_be_named(computed: st.Store) -> None:
    longest = {s.key: max(len(text) for text in s.text["t5"]) for s in computed}
    assert len(set(longest.values())) > 2
    for limit in range(1, 8):
        expected = [key for key, length in longest.items() if length > limit]
        for name in ("caption_tokens.long", "caption_tokens.long.t5", '"caption_tokens.long"'):
            assert [s.key for s in computed.where(f"{name} > {limit}")] == expected
    assert [s.key for s in computed.where("caption_tokens.short > 1")] == ["000-000", "000-002", "001-000", "001-002"]
    assert [s.key for s in computed.where("caption_tokens.short = 0")] == ["000-003"]
    assert [s.key for s in computed.where("caption_tokens.short IS NULL and height > 0")] == ["000-001", "001-001"]
    assert [s.key for s in pickle.loads(pickle.dumps(computed.where("caption_tokens.short = 0")))] == ["000-003"]


def test_arrays_of_numbers_can_be_named(computed: st.Store) -> None:
    expected = {
        "score > 0 and height >= 480": [s.key for s in computed if s.arrays["score"] > 0],
        '"has-text"': [s.key for s in computed if s.arrays["has-text"]],
        "clip_score.short > 0": [
            s.key for s in computed if len(values := s.arrays["clip_score.short"]) and values.mean() > 0
        ],
        "clip_score.short IS NULL": [s.key for s in computed if not len(s.arrays["clip_score.short"])],
    }
    for condition, keys in expected.items():
        assert 0 < len(keys) < len(computed), condition
        assert [sample.key for sample in computed.where(condition)] == keys, condition
    with pytest.raises(ConditionError, match=r"has no column 'mask'; .*, caption_tokens\.long, .*clip_score\.short"):
        computed.where("mask")
    with pytest.raises(ConditionError, match=r"has no column 'caption_tokens\.brief'"):
        computed.where("caption_tokens.brief > 1")


def test_a_condition_on_captions_has_an_order_that_resumes_and_splits(computed: st.Store) -> None:
    options: dict[str, Any] = {"batch_size": 1, "seed": 2, "where": "caption_tokens.long > 3"}
    alone = keys_of(computed.loader(**options))
    loader = computed.loader(**options)
    next(iter(loader))
    ranks = [computed.loader(**options, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(loader.state_dict())
    assert sorted(key for rank in ranks for key in keys_of(rank)) == sorted(alone[1:])
    assert sorted(alone) == [sample.key for sample in computed.where(options["where"])]


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
