"""Removed samples: gone for every reader at once, all others as they were, also in a training that continues."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagen_core import store as st
from tests.imagen_core.store.handmade_store import REMOVED_AT, Made, remove, samples_files

Make = Callable[..., Made]


def keys_of(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


@pytest.mark.parametrize("listed", [False, True], ids=["tombstone", "in the manifest"])
def test_a_removed_sample_is_gone_for_every_reader(make: Make, store_format: st.StoreFormat, listed: bool) -> None:
    made = make(store_format=store_format, excluded={1: [0]})
    remove(made.path, listed=listed, key=["000-003"], url=["https://example.com/2/0.jpg"])
    store = st.Store.open(made.path)
    left = [key for key in made.keys if key not in ("000-003", "002-000")]
    assert len(store) == len(left) == 9
    assert [sample.key for sample in store] == left
    assert sorted(keys_of(store.loader(batch_size=2))) == sorted(left)
    assert [len(batch["keys"]) for batch in store.loader(batch_size=3)] == [3, 3, 3], "new loaders have full batches"
    np.testing.assert_array_equal(store[3].images[8], made.images[8][4])
    report = st.verify_store(made.path)
    assert report.ok, report.problems
    assert not report.warnings
    assert (report.num_samples, report.excluded, report.unaccounted) == (9, {"made_up": 1, "removed": 2}, 0)


def test_the_log_has_digests_only_and_the_manifest_proves_it(make: Make) -> None:
    made = make()
    remove(made.path, key=["000-003", "never there"])
    log = made.path / "removed" / "00001.json"
    text = log.read_text()
    assert "000-003" not in text
    assert "never there" not in text
    raw = json.loads(text)
    assert (raw["time"], raw["reason"], len(raw["blocked"]["key"])) == (REMOVED_AT, "asked for", 2)
    assert st.Store.open(made.path).manifest.listed_removals[0]["path"] == "removed/00001.json"
    log.write_text(text.replace("asked for", "asked 4or"))
    assert [problem.file for problem in st.verify_store(made.path).problems] == ["removed/00001.json"]
    log.unlink()
    (problem,) = st.verify_store(made.path).problems
    assert problem.file == "removed/00001.json"
    assert "missing, but manifest.json says that there is one; restore it from a copy" in problem.message


def test_a_removal_requested_twice_is_logged_once_and_two_at_once_never_overwrite(make: Make) -> None:
    made = make()
    folder = remove(made.path, key=["000-003"])
    (made.path / "removed" / "log.json").unlink()  # as a kill before it leaves the folder
    remove(made.path, key=["000-003"])
    assert sorted(path.name for path in (made.path / "removed").iterdir()) == ["00001.json", "log.json"]
    found = st.find_rows(samples_files(folder), [], {"key": ["000-004"]})
    with pytest.raises(st.StoreError, match=r"00001.json: was written meanwhile"):
        st.add_removal(folder, [], found, {"key": ["000-004"]}, REMOVED_AT, "")


def test_a_far_store_is_removed_from_and_read_through_fsspec(make: Make) -> None:
    import fsspec

    made = make()
    url = f"memory://{made.path.name}-removal"
    memory = fsspec.filesystem("memory")
    memory.put(str(made.path), url, recursive=True)
    remove(url, listed=False, key=["000-003"])
    assert [sample.key for sample in st.Store.open(url)] == [key for key in made.keys if key != "000-003"]
    remove(url, sha256=[st.Store.open(url)[0].sha256])
    assert len(st.Store.open(url)) == 10
    assert len(st.Store.open(url).manifest.listed_removals) == 2
    found = st.find_rows(samples_files(st.StoreFolder(url)), [], {"key": ["000-004"]})
    with pytest.raises(st.StoreError, match="was written meanwhile"):
        st.add_removal(st.StoreFolder(url), [], found, {"key": ["000-004"]}, REMOVED_AT, "")


def without_chain(file: Path) -> None:
    raw = json.loads(file.read_text())
    del raw["previous"]
    file.write_text(json.dumps(raw))


def damaged(log: Path, how: str) -> str:
    """Damages a log of three removals, which no manifest lists; returns the file that readers should name."""
    first, second, third = (log / f"0000{number}.json" for number in (1, 2, 3))
    if how == "changed in the middle":
        second.write_text(second.read_text().replace("asked for", "asked 4or"))
        return "removed/00003.json"
    if how == "changed at the end":
        third.write_text(third.read_text().replace("asked for", "asked 4or"))
    elif how == "a gap":
        second.unlink()
        return "removed/00002.json"
    elif how == "a gap in an earlier version's":
        for file in (first, second, third):
            without_chain(file)
        (log / "log.json").unlink()
        second.unlink()
        return "removed/00002.json"
    elif how == "shortened":
        third.unlink()
    elif how == "emptied":
        for file in (first, second, third):
            file.unlink()
        return "removed/00001.json"
    elif how == "exchanged":
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
        return "removed/00001.json"
    else:
        (log / "log.json").write_bytes(b"\0" * 40)
        return "removed/log.json"
    return "removed/00003.json"


@pytest.mark.parametrize(
    "how",
    [
        "changed in the middle",
        "changed at the end",
        "a gap",
        "a gap in an earlier version's",
        "shortened",
        "emptied",
        "exchanged",
        "no end",
    ],
)
def test_a_damaged_log_of_removals_is_an_error_that_names_the_file(make: Make, how: str) -> None:
    made = make()
    for key in ("000-001", "000-003", "002-000"):
        remove(made.path, listed=False, key=[key])
    assert len(st.Store.open(made.path)) == 9
    file = damaged(made.path / "removed", how)
    with pytest.raises(st.ManifestError, match=rf"{file}: .*restore it from a copy of the store") as error:
        st.Store.open(made.path)
    assert error.value.file == file
    with pytest.raises(st.ManifestError):
        st.load_removals(st.StoreFolder(made.path))
    assert file in [problem.file for problem in st.verify_store(made.path).problems]
    with pytest.raises(st.ManifestError):
        remove(made.path, key=["000-004"])


def test_a_log_that_is_shorter_than_the_manifest_says_is_an_error_that_names_the_file(make: Make) -> None:
    made = make()
    remove(made.path, key=["000-001"])
    remove(made.path, key=["000-003"])
    (made.path / "removed" / "log.json").unlink()
    assert len(st.Store.open(made.path)) == 10, "the manifest says how long the log is too"
    (made.path / "removed" / "00002.json").unlink()
    with pytest.raises(
        st.ManifestError, match=r"removed/00002\.json: missing, but manifest\.json says that there is one"
    ):
        st.Store.open(made.path)


def test_a_log_of_an_earlier_version_is_read_and_continued(make: Make) -> None:
    made = make()
    for key in ("000-001", "000-003"):
        remove(made.path, listed=False, key=[key])
    for number in (1, 2):
        without_chain(made.path / "removed" / f"0000{number}.json")
    (made.path / "removed" / "log.json").unlink()
    assert len(st.Store.open(made.path)) == 10
    remove(made.path, key=["002-000"])
    assert len(st.Store.open(made.path)) == 9
    assert st.verify_store(made.path).ok
    second = made.path / "removed" / "00002.json"
    assert st.load_removals(st.StoreFolder(made.path))[2].previous == sha256(second.read_bytes()).hexdigest()


@pytest.mark.parametrize("window", [None, 2], ids=["shuffled", "windowed"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_training_goes_on_in_its_order_without_the_removed_samples(
    make: Make, window: int | None, world_size: int
) -> None:
    made = make()
    options: dict[str, Any] = {"images": [4], "text": "t5", "seed": 3, "shuffle_window_shards": window}
    before = st.Store.open(made.path)
    reference = before.loader(batch_size=4, **options)
    expected = [list(reference) for _ in range(3)]
    state = json.loads(json.dumps(next_state(before, options)))
    remove(made.path, key=["000-001", "002-003"])
    remove(made.path, key=["001-002"])
    gone = {"000-001", "002-003", "001-002"}
    store = st.Store.open(made.path)
    loaders = [
        store.loader(batch_size=4 // world_size or 1, rank=r, world_size=world_size, **options)
        for r in range(world_size)
    ]
    for loader in loaders:
        loader.load_state_dict(state)
    epochs = [[keys_of(batches) for batches in zip(*loaders, strict=True)] for _ in range(3)]
    wanted = [[key for key in keys_of(epoch) if key not in gone] for epoch in expected]
    wanted[0] = [key for key in keys_of(expected[0][1:]) if key not in gone]
    assert [[key for keys in epoch for key in keys] for epoch in epochs] == wanted
    assert all(loader.state_dict()["num_removals"] == 0 for loader in loaders), "it keeps its order for good"
    if world_size == 1:
        assert [len(keys) for keys in epochs[1]] == [
            sum(key not in gone for key in batch["keys"]) for batch in expected[1]
        ]


def next_state(store: st.Store, options: dict[str, Any]) -> dict[str, Any]:
    loader = store.loader(batch_size=4, **options)
    next(iter(loader))
    return loader.state_dict()


def test_the_values_of_a_resumed_batch_are_those_of_its_samples(make: Make) -> None:
    made = make()
    state = st.Store.open(made.path).loader(batch_size=4).state_dict()
    remove(made.path, key=["000-001"])
    store = st.Store.open(made.path)
    loader = store.loader(batch_size=4, images=[8], text="t5")
    loader.load_state_dict(state)
    sizes = []
    for batch in loader:
        sizes.append(loader.global_size)
        assert len(batch["keys"]) == len(batch["images"][8]) == len(batch["text"]) == loader.global_size
        for k, key in enumerate(batch["keys"]):
            pixels = made.images[8][made.keys.index(key)]
            np.testing.assert_array_equal(batch["images"][8][k].permute(1, 2, 0).numpy(), pixels)
    assert sorted(sizes) == [3, 4, 4]


def test_a_state_that_knows_of_more_removals_than_the_store_is_refused(make: Make) -> None:
    made, copy = make(), make("copy")
    remove(made.path, key=["000-001"])
    state = st.Store.open(made.path).loader(batch_size=2).state_dict()
    with pytest.raises(ValueError, match="knows 1 removals, this store has 0: it is an older copy"):
        st.Store.open(copy.path).loader(batch_size=2).load_state_dict(state)


def test_a_state_of_other_samples_is_refused_after_a_removal_too(make: Make) -> None:
    made = make()
    state = st.Store.open(made.path).loader(batch_size=2, samples=range(3, 9)).state_dict()
    remove(made.path, key=["000-001"])
    with pytest.raises(ValueError, match="loader state has num_samples 6, this loader has 11"):
        st.Store.open(made.path).loader(batch_size=2).load_state_dict(state)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_an_erased_shard_has_the_other_rows_as_they_were(
    make: Make, store_format: st.StoreFormat, dtype: st.StoreDtype
) -> None:
    made = make(store_format=store_format, dtype=dtype, shard_rows=(5,), codec="png", sizes=(8,))
    before = list(st.Store.open(made.path))
    folder = remove(made.path, key=["000-001", "000-004"])
    manifest = st.load_manifest(folder)
    (index, samples, _), *_ = samples_files(folder)
    erased = st.ErasedShard.of(index, samples, st.removed_rows(st.load_removals(folder), 0, samples))
    new = {}
    for name, entry in manifest.shard(0).files.items():
        path = st.shard_path(name, 0, manifest.groups[name].format, 1)
        rows = erased.write(manifest.groups[name], folder.path(entry.path), made.path / path)
        data = (made.path / path).read_bytes()
        new[0, name] = st.FileEntry(path, len(data), sha256(data).hexdigest(), rows)
        (made.path / entry.path).unlink()
    st.rewrite_manifest(folder, new)
    report = st.verify_store(made.path)
    assert report.ok, report.problems
    after = list(st.Store.open(made.path))
    assert [sample.key for sample in after] == ["000-000", "000-002", "000-003"]
    for sample in after:
        previous = next(old for old in before if old.key == sample.key)
        assert (sample.captions, sample.url, sample.sha256) == (previous.captions, previous.url, previous.sha256)
        np.testing.assert_array_equal(sample.images[8], previous.images[8])
        for x, y in zip(sample.text["t5"], previous.text["t5"], strict=True):
            np.testing.assert_array_equal(x, y)
    rows = st.read_samples(made.path / "samples" / "00000.r1.parquet")
    assert [(row.key, row.captions) for row in rows if row.key.startswith("removed")] == [
        ("removed/00000/1", ("",)),
        ("removed/00000/4", ("", "")),
    ], "row 1 shares a caption with row 0, row 4 none"
    again = st.ErasedShard.of(0, st.SamplesFile(folder.path("samples/00000.r1.parquet"), "samples"), {1, 4})
    assert again.samples == rows, "erasing twice is erasing once"
