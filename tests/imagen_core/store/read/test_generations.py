"""A store that is compacted, or made again, while it is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagen_core import store as st
from imagen_core.store.read import generations
from stages.store_tools import compact as compaction
from stages.store_tools.compact import compact
from tests.imagen_core.store.handmade_store import Made, remove

Make = Callable[..., Made]
GONE = "000-003"


@pytest.fixture
def looks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    look = generations.Generations.look
    monkeypatch.setattr(generations.Generations, "look", lambda self, *, after_s=0: look(self, after_s=0))


def keys_of(batches: Any) -> list[list[str]]:
    return [batch["keys"] for batch in batches]


@pytest.mark.parametrize("window", [None, 2], ids=["shuffled", "windowed"])
def test_a_loader_goes_on_in_its_order_with_the_files_of_a_compaction(
    make: Make, store_format: st.StoreFormat, window: int | None
) -> None:
    made = make(store_format=store_format, shard_rows=(5, 3, 4), excluded={1: [0]})
    options: dict[str, Any] = {"images": [8], "text": "t5", "seed": 3, "shuffle_window_shards": window}
    expected = keys_of(st.Store.open(made.path).loader(3, **options))
    store = st.Store.open(made.path, max_open_shards=1)
    loader = store.loader(3, **options)
    batches = iter(loader)
    found = [next(batches)]
    remove(made.path, key=[GONE])
    assert compact(made.path, None).files == 4
    assert not (made.path / "samples" / "00000.parquet").exists()
    found += batches
    later = [[key for key in keys if key != GONE] for keys in expected[1:]]
    assert keys_of(found) == [expected[0], *later]
    for batch in found[1:]:
        for k, key in enumerate(batch["keys"]):
            pixels = batch["images"][8][k].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(pixels, made.images[8][made.keys.index(key)])
    state = json.loads(json.dumps(loader.state_dict()))
    second = [key for keys in keys_of(loader) for key in keys]
    resumed = st.Store.open(made.path).loader(3, **options)
    resumed.load_state_dict(state)
    assert [key for keys in keys_of(resumed) for key in keys] == second, "a later reader has the same order"


def test_samples_keep_their_index_and_a_removed_one_is_refused(make: Make, looks_always: None) -> None:
    made = make(shard_rows=(5, 3, 4))
    store = st.Store.open(made.path, max_open_shards=1)
    left = [key for key in made.keys if key != GONE]
    samples = iter(store)
    first = next(samples)
    remove(made.path, key=[GONE])
    compact(made.path, None)
    assert [first.key, *(sample.key for sample in samples)] == left
    assert store[4].key == made.keys[4]
    with pytest.raises(st.StoreError, match="the sample was removed since the store was opened; open it again"):
        store[3]
    assert len(store) == len(made.keys), "until it is opened again"
    assert len(st.Store.open(made.path)) == len(left)


def test_an_open_reader_notices_a_removal_within_a_minute(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(shard_rows=(12,))
    now = [100.0]
    monkeypatch.setattr(generations.time, "monotonic", lambda: now[0])
    loader = st.Store.open(made.path).loader(4, images=[4], shuffle=False)
    batches = iter(loader)
    assert next(batches)["keys"] == made.keys[:4]
    remove(made.path, key=[made.keys[5], made.keys[9]])
    now[0] += 59
    assert next(batches)["keys"] == made.keys[4:8], "it goes on with what it opened"
    now[0] += 2
    assert next(batches)["keys"] == [key for key in made.keys[8:12] if key != made.keys[9]]
    assert loader.global_size == 3


@pytest.mark.parametrize("manifest", ["new", "not yet written"])
def test_a_store_that_was_made_again_with_other_content_is_refused_and_not_mixed(
    make: Make, tmp_path: Path, manifest: str
) -> None:
    made, other = make(shard_rows=(5, 3)), make("other", shard_rows=(5, 3), seed=7)
    store = st.Store.open(made.path)
    assert store[0].key == made.keys[0]
    shutil.rmtree(made.path / "images-8")
    shutil.copytree(other.path / "images-8", made.path / "images-8")
    if manifest == "new":
        shutil.copy(other.path / "manifest.json", made.path / "manifest.json")
        expected = "made again with other content since it was opened"
    else:
        (made.path / "manifest.json").unlink()
        expected = "so it was changed since; .*; the store has no manifest now, as while a run makes it again"
    with pytest.raises(st.StoreError, match=rf"images-\d/00001\.parquet: .*{expected}"):
        store[5]


def test_a_store_that_was_made_again_with_the_same_content_is_read_on(make: Make) -> None:
    made, same = make(shard_rows=(5, 3)), make("same", shard_rows=(5, 3))
    store = st.Store.open(made.path)
    assert store[0].key == made.keys[0]
    shutil.rmtree(made.path)
    shutil.copytree(same.path, made.path)
    assert [sample.key for sample in store] == made.keys


def test_replaced_files_stay_for_the_time_of_grace(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made, slept = make(shard_rows=(5, 3)), []
    old = made.path / "samples" / "00000.parquet"

    def sleep(seconds: float) -> None:
        assert old.exists()
        assert st.load_manifest(made.path).shard(0).files["samples"].path == "samples/00000.r1.parquet"
        slept.append(seconds)

    monkeypatch.setattr(compaction.time, "sleep", sleep)
    remove(made.path, key=[GONE])
    compact(made.path, None, grace_s=7)
    assert not old.exists()
    compact(made.path, None, grace_s=7)
    assert slept == [7], "there is nothing to wait for the second time"
    monkeypatch.setattr(compaction, "file_system_type", lambda _: "nfs4")
    assert compaction._default_grace_s(made.path) == 2 * generations.LOOK_EVERY_S
    monkeypatch.setattr(compaction, "file_system_type", lambda _: "ext4")
    assert compaction._default_grace_s(made.path) == 0
