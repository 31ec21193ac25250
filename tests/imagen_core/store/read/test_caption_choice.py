"""Which set of captions a loader takes for each sample, and which of its captions."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagen_core.store import Mixture, Store, load_manifest, read_captions, verify_store, write_captions
from imagen_core.store.read.caption_choice import wanted_weights
from tests.imagen_core.store.caption_sets_added import add_caption_sets
from tests.imagen_core.store.handmade_store import make_store, remove, rewrite_manifest

SHARDS = (50, 50, 20)
WEIGHTS = {"long": 0.5, "short": 0.3, "tags": 0.2}


def short(shard: int, row: int) -> list[str]:
    """Rows whose number divides by 4 have none."""
    return [] if row % 4 == 0 else [f"short {shard} {row}"]


def tags(shard: int, row: int) -> list[str]:
    """Odd rows have two, rows from 40 on one that could not be encoded; others none."""
    return ["empty"] if row >= 40 else [f"tags {row}", f"tags {row} {shard}"] if row % 2 else []


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three sets; tests must not change it."""
    root = tmp_path_factory.mktemp("sets") / "store"
    make_store(root, shard_rows=SHARDS, sizes=(), num_captions=2)
    add_caption_sets(root, {"short": short, "tags": tags}, WEIGHTS)
    return root


def taken(store: Store, epochs: int = 1, **options: Any) -> list[tuple[str, str]]:
    """Key and caption of the samples of some epochs, in their order."""
    loader = store.loader(**{"batch_size": 7, "captions": True, "text": "t5", "seed": 3, **options})
    found: list[tuple[str, str]] = []
    for _ in range(epochs):
        for batch in loader:
            found += zip(batch["keys"], batch["captions"], strict=True)
    return found


def set_of(caption: str) -> str:
    return next((name for name in ("short", "tags") if caption.startswith(name)), "long")


def place(key: str) -> tuple[int, int]:
    shard, _, row = key.partition("-")
    return int(shard), int(row)


def test_a_store_knows_its_sets_and_each_sample_what_it_has_of_them(path: Path) -> None:
    store = Store.open(path)
    assert store.caption_sets == WEIGHTS
    assert verify_store(path).ok
    for sample in store:
        at = place(sample.key)
        assert sample.caption_sets == {"long": sample.captions, "short": short(*at), "tags": tags(*at)}
        assert [len(array) for array in sample.set_texts["tags"]["t5"]] == [2 * (c != "empty") for c in tags(*at)]
    assert Store.open(path).text_group("t5").encoder == "t5"
    assert store.encoders == ["t5"]


def test_a_set_is_chosen_by_weight_among_those_that_the_sample_has(path: Path) -> None:
    store, epochs = Store.open(path), 100
    found = taken(store, epochs)
    counts: dict[str, Counter[str]] = {}
    for key, caption in found:
        counts.setdefault(key, Counter())[set_of(caption)] += 1
    expected: dict[tuple[str, ...], Counter[str]] = {}
    for key, count in counts.items():
        shard, row = place(key)
        have = ("long", *(["short"] if short(shard, row) else []), *(["tags"] if row % 2 and row < 40 else []))
        assert count.keys() <= set(have), "a caption that could not be encoded is never taken"
        expected.setdefault(have, Counter()).update(count)
    assert set(expected) == {("long",), ("long", "short"), ("long", "short", "tags")}
    for have, count in expected.items():
        draws, weights = count.total(), np.array([WEIGHTS[name] for name in have])
        for name, share in zip(have, weights / weights.sum(), strict=True):
            deviation = np.sqrt(share * (1 - share) / draws)
            assert abs(count[name] / draws - share) <= 4 * deviation, (have, name)


def test_the_choice_is_the_same_at_another_world_size_and_batch_size_and_after_a_resume(path: Path) -> None:
    store = Store.open(path)
    alone = dict(taken(store))
    assert {set_of(caption) for caption in alone.values()} == {"long", "short", "tags"}
    for world_size, batch_size in ((2, 5), (3, 4)):
        ranks = [taken(store, rank=rank, world_size=world_size, batch_size=batch_size) for rank in range(world_size)]
        assert dict(pair for rank in ranks for pair in rank) == alone
    loader = store.loader(batch_size=7, captions=True, text="t5", seed=3)
    batches = iter(loader)
    first = [next(batches) for _ in range(4)]
    resumed = store.loader(batch_size=5, captions=True, text="t5", seed=3, rank=0, world_size=1)
    resumed.load_state_dict(loader.state_dict())
    rest = {k: c for batch in resumed for k, c in zip(batch["keys"], batch["captions"], strict=True)}
    assert {k: c for b in first for k, c in zip(b["keys"], b["captions"], strict=True)} | rest == alone
    assert dict(taken(store, seed=4)) != alone
    assert dict(taken(store, 2)[len(store) :]) != alone, "another epoch"


def test_embeddings_are_those_of_the_caption(path: Path) -> None:
    store = Store.open(path)
    found = 0
    for batch in store.loader(batch_size=16, text="t5", captions=True, seed=1):
        for caption, row, mask in zip(batch["captions"], batch["text"], batch["text_mask"], strict=True):
            if set_of(caption) != "long":
                found += 1
                assert mask.sum() == 2
                assert (row[:2] == len(caption)).all()
    assert found > 20


def test_with_all_weight_on_the_first_set_a_loader_gives_what_it_gave_without_sets(path: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "store", shard_rows=SHARDS, sizes=(), num_captions=2)
    without = Store.open(tmp_path / "store")
    assert without.caption_sets == {"original": 1.0}
    assert without[0].caption_sets == {"original": without[0].captions}
    assert taken(without, 2) == taken(Store.open(path), 2, caption_sets={"long": 1.0})
    assert taken(without, 2) == taken(Store.open(path), 2, caption_sets={"long": 2, "short": 0.0})


def test_a_sample_without_a_caption_of_the_sets_has_one_of_the_first(path: Path) -> None:
    found = dict(taken(Store.open(path), caption_sets={"tags": 1.0}))
    for key, caption in found.items():
        _, row = place(key)
        assert set_of(caption) == ("tags" if row % 2 and row < 40 else "long")
    online = dict(taken(Store.open(path), caption_sets={"tags": 1.0}, text=None))  # encoded in the training loop
    assert sum(caption == "empty" for caption in online.values()) == 20


def test_a_mixture_takes_from_the_sets_of_each_store(path: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "store", shard_rows=(30,), sizes=(), key_prefix="other-")
    stores = {"a": Store.open(path), "b": Store.open(tmp_path / "store")}
    loader = Mixture(stores, {"a": 1.0, "b": 1.0}).loader(batch_size=40, captions=True, text="t5")
    found: Counter[str] = Counter()
    for batch, _ in zip(loader, range(5), strict=False):
        for key, caption in zip(batch["keys"], batch["captions"], strict=True):
            found["other" if key.startswith("other") else set_of(caption)] += 1
    assert found["other"] == 100
    assert min(found["long"], found["short"], found["tags"]) > 5
    with pytest.raises(ValueError, match="store b: caption set 'short' is not in the store; it has original"):
        Mixture(stores, {"a": 1.0, "b": 1.0}).loader(batch_size=4, captions=True, caption_sets={"short": 1.0})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"brief": 1.0}, "caption set 'brief' is not in the store; it has long, short, tags"),
        ({"long": 0.0}, "all are 0"),
        ({}, "all are 0"),
        ({"long": float("nan")}, "long has nan"),
        ({"long": 1.0, "short": -1.0}, "short has -1.0"),
    ],
)
def test_weights_that_cannot_be_are_refused(wanted: Mapping[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wanted_weights(WEIGHTS, wanted)


def test_a_set_that_was_not_encoded_is_refused_where_its_embeddings_are_read(tmp_path: Path) -> None:
    make_store(tmp_path / "store", shard_rows=(4,), sizes=())
    add_caption_sets(tmp_path / "store", {"short": short}, {"long": 1.0, "short": 1.0}, encoded=False)
    store = Store.open(tmp_path / "store")
    with pytest.raises(ValueError, match="caption set 'short' is not encoded by 't5' in the store"):
        store.loader(batch_size=1, text="t5")
    assert {set_of(caption) for _, caption in taken(store, 20, text=None)} == {"long", "short"}


def test_a_header_that_lists_sets_wrongly_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "store", shard_rows=(2,), sizes=())
    for listed in ([{"name": "a"}], [{"name": "a", "weight": -1}], 3):
        with pytest.raises(ValueError, match="captions must be a list of name and weight of each set"):
            rewrite_manifest(tmp_path / "store", captions=listed)


def test_a_removed_sample_is_gone_from_the_sets_and_verify_finds_exchanged_rows(tmp_path: Path) -> None:
    root = tmp_path / "store"
    make_store(root, shard_rows=(8,), sizes=())
    add_caption_sets(root, {"short": short}, {"long": 1.0, "short": 1.0})
    remove(root, key=["000-001"])
    assert verify_store(root).ok
    assert "000-001" not in dict(taken(Store.open(root)))
    manifest = load_manifest(root)
    header = {"captions": manifest.header["captions"]}
    path = root / "captions-short" / "00000.parquet"
    rows, keys = read_captions(path), [f"000-{row:03d}" for row in range(8)]
    write_captions(path, [keys[0], keys[1], keys[3], keys[2], *keys[4:]], rows)
    rewrite_manifest(root, **header)
    (problem,) = verify_store(root).problems
    assert problem.message == "2 rows do not belong to their samples, the first in row 2 ('000-002')"
