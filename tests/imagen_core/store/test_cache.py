"""The local cache of a remote store: complete files, bounded bytes, any number of processes."""

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import fsspec
import pytest

from imagen_core import store as st
from imagen_core.files import file_digest
from imagen_core.store.cache import FileCache
from tests.imagen_core.store.handmade_store import Made
from tests.imagen_core.store.test_store import check_equal

Make = Callable[..., Made]


@pytest.fixture
def far(make: Make, tmp_path: Path) -> Iterator[tuple[str, Made]]:
    """A store in memory, and what it holds."""
    made = make(shard_rows=(5, 3, 4, 6), excluded={1: [0]})
    url = f"memory://{tmp_path.name}/store"
    memory = fsspec.filesystem("memory")
    for path in made.path.rglob("*.*"):
        memory.pipe(f"{url}/{path.relative_to(made.path).as_posix()}", path.read_bytes())
    yield url, made
    memory.rm(url.rpartition("/")[0], recursive=True)


def copies(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def file_of(store: st.Store, group: str, shard: int) -> st.FileEntry:
    entry = store.manifest.file(group, shard)
    assert entry is not None
    return entry


def test_each_file_is_fetched_once_and_then_read_without_the_original(far: tuple[str, Made], tmp_path: Path) -> None:
    url, made = far
    check_equal(st.Store.open(url, cache_dir=tmp_path / "cache"), made, "float16")
    store = st.Store.open(url, cache_dir=tmp_path / "cache")
    fsspec.filesystem("memory").rm([f"{url}/{group}" for group in store.manifest.groups], recursive=True)
    check_equal(store, made, "float16")
    check_equal(pickle.loads(pickle.dumps(store)), made, "float16")
    on_disk = [path for path in made.path.rglob("*.*") if path.name not in ("manifest.json", "null.safetensors")]
    assert sorted(copies(tmp_path / "cache").values()) == sorted(path.read_bytes() for path in on_disk)


def test_only_what_is_read_is_fetched(far: tuple[str, Made], tmp_path: Path) -> None:
    store = st.Store.open(far[0], cache_dir=tmp_path / "cache")
    next(iter(store.loader(2, [8], shuffle=False)))
    names = {file_of(store, "samples", 0).sha256, file_of(store, "images-8", 0).sha256}
    assert set(copies(tmp_path / "cache")) == names


def user_of(url: str, cache: FileCache) -> Callable[[int], AbstractContextManager[str]]:
    """use(shard) opens the shard's images through the cache."""
    store, memory = st.Store.open(url), fsspec.filesystem("memory")

    def use(shard: int) -> AbstractContextManager[str]:
        entry = file_of(store, "images-8", shard)
        return cache.file(entry, "x", lambda path: memory.get_file(f"{url}/{entry.path}", str(path)))

    return use


def test_the_least_recently_used_files_go_first(far: tuple[str, Made], tmp_path: Path) -> None:
    opened = st.Store.open(far[0])
    entries = [file_of(opened, "images-8", shard) for shard in range(4)]
    use = user_of(far[0], FileCache(tmp_path / "cache", max_bytes=sum(entry.bytes for entry in entries) - 1))
    for time_ns, shard in enumerate((0, 1, 2, 0)):
        with use(shard) as copy:
            os.utime(copy, ns=(time_ns, time_ns))  # the clock of the file system may be coarse
    with use(3):
        pass
    assert set(copies(tmp_path / "cache")) == {entries[shard].sha256 for shard in (0, 2, 3)}


def test_a_cache_smaller_than_one_file_still_reads_everything(far: tuple[str, Made], tmp_path: Path) -> None:
    url, made = far
    check_equal(st.Store.open(url, cache_dir=tmp_path / "cache", cache_bytes=1, max_open_shards=1), made, "float16")
    assert len(copies(tmp_path / "cache")) == 1


def test_a_file_in_use_is_not_removed(far: tuple[str, Made], tmp_path: Path) -> None:
    use = user_of(far[0], FileCache(tmp_path / "cache", max_bytes=1))
    with use(0) as kept:
        with use(1):
            assert os.path.exists(kept)
        assert os.path.exists(kept)
    with use(2) as other:
        assert not os.path.exists(kept)
        assert os.path.exists(other)


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_download_that_is_not_the_manifests_is_refused_and_not_kept(
    far: tuple[str, Made], tmp_path: Path, damage: str
) -> None:
    url, _ = far
    memory = fsspec.filesystem("memory")
    entry = file_of(st.Store.open(url), "images-8", 0)
    data = bytearray(memory.cat(f"{url}/{entry.path}"))
    data[40] ^= 1
    memory.pipe(f"{url}/{entry.path}", bytes(data[:-7] if damage == "truncated" else data))
    store = st.Store.open(url, cache_dir=tmp_path / "cache")
    with pytest.raises(
        st.StoreError, match=r"images-8/00000\.parquet: downloaded \d+ bytes with sha256 \w+, the manif"
    ):
        store[0]
    assert not any(name.startswith(entry.sha256) for name in copies(tmp_path / "cache"))
    data[40] ^= 1
    memory.pipe(f"{url}/{entry.path}", bytes(data))
    assert store[0].key == "000-000"


def test_half_written_and_truncated_copies_are_fetched_again(far: tuple[str, Made], tmp_path: Path) -> None:
    url, made = far
    cache = tmp_path / "cache"
    cache.mkdir()
    opened = st.Store.open(url)
    half, truncated = file_of(opened, "images-8", 0), file_of(opened, "images-4", 0)
    (cache / f"{half.sha256}.part").write_bytes(b"half")
    (cache / truncated.sha256).write_bytes(bytes(truncated.bytes - 1))
    check_equal(st.Store.open(url, cache_dir=cache), made, "float16")
    assert not any(name.endswith(".part") for name in copies(cache))


def test_a_copy_that_was_changed_is_fetched_again(
    far: tuple[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, made = far
    cache = tmp_path / "cache"
    check_equal(st.Store.open(url, cache_dir=cache), made, "float16")
    whole = copies(cache)
    for path in cache.iterdir():
        if not path.name.startswith("."):
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    check_equal(st.Store.open(url, cache_dir=cache), made, "float16")
    assert copies(cache) == whole
    read = []
    monkeypatch.setattr("imagen_core.store.cache.file_digest", lambda path: read.append(path) or file_digest(path))
    store = st.Store.open(url, cache_dir=cache, max_open_shards=1)
    for _ in range(2):
        check_equal(store, made, "float16")
    assert len(read) == len(whole), "each copy is read once per process to compare it"


def test_a_missing_original_is_named(far: tuple[str, Made], tmp_path: Path) -> None:
    store = st.Store.open(far[0], cache_dir=tmp_path / "cache")
    fsspec.filesystem("memory").rm(f"{far[0]}/text-t5/00000.parquet")
    with pytest.raises(st.StoreError, match=r"text-t5/00000\.parquet: missing; "):
        store[0]


def _read_all(path: Path, cache: Path, cache_bytes: int, results: "multiprocessing.Queue[list[list[str]]]") -> None:
    store = st.Store.open(path, cache_dir=cache, cache_bytes=cache_bytes, max_open_shards=1)
    loader = store.loader(3, [8, 4], "t5", seed=1)
    results.put([[key for batch in loader for key in batch["keys"]] for _ in range(2)])


@pytest.mark.slow
def test_processes_share_a_cache_that_is_too_small_for_them(make: Make, tmp_path: Path) -> None:
    made = make(store_format="hdf5", shard_rows=(5, 3, 4, 6))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (made.path, tmp_path / "cache", 6000, results)
    processes = [context.Process(target=_read_all, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    read = [results.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(timeout=100)
    assert [process.exitcode for process in processes] == [0] * 3
    assert all(sorted(epoch) == sorted(made.keys) for epochs in read for epoch in epochs)
    assert read[1:] == read[:1] * 2
    known = {entry.sha256 for shard in st.Store.open(made.path).manifest.shards() for entry in shard.files.values()}
    assert set(copies(tmp_path / "cache")) <= known


def test_a_cache_of_no_bytes_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache_bytes must be 1 or more \(got 0\)"):
        st.Store.open(make().path, cache_dir=tmp_path / "cache", cache_bytes=0)
