"""Store: every sample as it was written, from either format, from anywhere."""

import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable

import fsspec
import numpy as np
import pytest

from imagen_core import store as st
from tests.imagen_core.store.handmade_store import DIM, Made

DTYPES: list[st.StoreDtype] = ["float16", "bfloat16", "float32", "int8"]
Make = Callable[..., Made]


def check_equal(store: st.Store, made: Made, dtype: st.StoreDtype) -> None:
    assert len(store) == len(made.keys)
    for i, sample in enumerate(store):
        assert (sample.key, sample.captions) == (made.keys[i], made.captions[i])
        for size, images in made.images.items():
            assert sample.images[size].dtype == np.uint8
            np.testing.assert_array_equal(sample.images[size], images[i])
        for got, x in zip(sample.text["t5"], made.text[i], strict=True):
            np.testing.assert_array_equal(got, st.restore(st.cast_embedding(x, dtype), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_are_read_as_written(make: Make, store_format: st.StoreFormat, dtype: st.StoreDtype) -> None:
    made = make(store_format=store_format, dtype=dtype)
    store = st.Store.open(made.path)
    check_equal(store, made, dtype)
    null = store.null("t5")
    assert null.dtype == (np.float16 if dtype == "float16" else np.float32)
    np.testing.assert_allclose(null, made.null, rtol=2**-8)


def test_both_formats_hold_identical_samples(make: Make) -> None:
    one, two = (st.Store.open(make(f, store_format=f).path) for f in ("parquet", "hdf5"))
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        assert (a.key, a.captions, a.url, a.sha256, a.width, a.height) == (
            b.key,
            b.captions,
            b.url,
            b.sha256,
            b.width,
            b.height,
        )
        for size in (4, 8):
            np.testing.assert_array_equal(a.images[size], b.images[size])
        for x, y in zip(a.text["t5"], b.text["t5"], strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_store_tells_what_it_holds(make: Make) -> None:
    store = st.Store.open(make().path)
    assert store.image_sizes == [4, 8]
    assert store.encoders == ["t5"]
    assert store.manifest.num_samples == len(store) == 12
    assert store.manifest.texts["t5"].fingerprint == {"model": "tiny"}
    sample = store[1]
    assert (sample.url, sample.width, sample.height) == (None, 640, 481)
    assert store[0].url == "https://example.com/0/0.jpg"


def test_indices_are_those_of_a_list(make: Make) -> None:
    made = make()
    store = st.Store.open(made.path)
    assert store[-1].key == made.keys[-1]
    assert store[np.int64(6)].key == made.keys[6]
    assert [sample.key for sample in store[3:10:3]] == made.keys[3:10:3]
    for index in (12, -13):
        with pytest.raises(IndexError, match=f"sample {index} of a store of 12"):
            store[index]
    with pytest.raises(TypeError):
        store["0"]  # type: ignore[index]


def test_samples_can_be_changed_without_changing_the_store(make: Make, store_format: st.StoreFormat) -> None:
    store = st.Store.open(make(store_format=store_format, dtype="float32").path)
    before = store[0].images[8].copy()
    sample = store[0]
    sample.images[8][:] = 0
    sample.text["t5"][0][:] = 0
    np.testing.assert_array_equal(store[0].images[8], before)
    assert store[0].text["t5"][0].any()


def test_excluded_rows_are_never_returned(make: Make, store_format: st.StoreFormat) -> None:
    made = make(store_format=store_format, excluded={0: [0, 1, 4], 1: [0, 1, 2], 2: [3]})
    store = st.Store.open(made.path)
    assert [sample.key for sample in store] == ["000-002", "000-003", "002-000", "002-001", "002-002"]
    check_equal(store, made, "float16")
    seen = [key for batch in store.loader(batch_size=2, images=[8], text="t5") for key in batch["keys"]]
    assert sorted(seen) == sorted(made.keys)


def test_one_open_shard_is_enough(make: Make, store_format: st.StoreFormat) -> None:
    made = make(store_format=store_format)
    store = st.Store.open(made.path, max_open_shards=1)
    assert [store[i].key for i in (0, 11, 0, 6)] == [made.keys[i] for i in (0, 11, 0, 6)]
    assert len(store._open) == 1


def test_a_pickled_store_reads_on(make: Make, store_format: st.StoreFormat) -> None:
    made = make(store_format=store_format)
    store = st.Store.open(made.path)
    assert store[0].key == made.keys[0]
    check_equal(pickle.loads(pickle.dumps(store)), made, "float16")


def _read_in_child(store: st.Store, queue: "multiprocessing.Queue[list[str]]") -> None:
    queue.put([sample.key for sample in store])


def test_a_forked_process_reads_on(make: Make, store_format: st.StoreFormat) -> None:
    made = make(store_format=store_format)
    store = st.Store.open(made.path)
    assert store[0].key == made.keys[0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(store, queue))
    child.start()
    assert queue.get(timeout=60) == made.keys
    child.join(timeout=60)
    assert child.exitcode == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_remote_store_reads_equal(make: Make, store_format: st.StoreFormat, dtype: st.StoreDtype) -> None:
    made = make(store_format=store_format, dtype=dtype)
    url = f"memory://bucket-{store_format}-{dtype}/store"
    remote = fsspec.filesystem("memory")
    for path in made.path.rglob("*.*"):
        remote.pipe(f"{url}/{path.relative_to(made.path).as_posix()}", path.read_bytes())
    store = st.Store.open(url)
    check_equal(store, made, dtype)
    np.testing.assert_array_equal(store.null("t5"), st.Store.open(made.path).null("t5"))
    check_equal(pickle.loads(pickle.dumps(store)), made, dtype)
    assert st.verify_store(url).problems == []
    remote.rm(url, recursive=True)


def test_a_file_url_is_a_local_store(make: Make) -> None:
    made = make()
    check_equal(st.Store.open(f"file://{made.path}"), made, "float16")


@pytest.mark.parametrize("group", ["samples", "images-8", "text-t5"])
def test_a_missing_or_truncated_file_is_named(make: Make, store_format: st.StoreFormat, group: str) -> None:
    made = make(store_format=store_format)
    (path,) = (made.path / group).glob("00001.*")
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    store = st.Store.open(made.path)
    assert store[0].key == made.keys[0]
    with pytest.raises(st.StoreError, match=rf"{group}/00001\.\w+: {len(data) - 1} bytes, .*pipeline verify"):
        store[5]
    path.unlink()
    with pytest.raises(st.StoreError, match=rf"{group}/00001\.\w+: missing; .*run the pipeline command"):
        store[5]


@pytest.mark.parametrize("group", ["samples", "images-8", "text-t5"])
def test_an_unreadable_file_is_named(make: Make, store_format: st.StoreFormat, group: str) -> None:
    made = make(store_format=store_format)
    (path,) = (made.path / group).glob("00001.*")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(st.StoreError, match=rf"{group}/00001\.\w+: not readable as (parquet|hdf5)"):
        st.Store.open(made.path)[5]


def test_an_unknown_encoder_is_refused(make: Make) -> None:
    store = st.Store.open(make().path)
    with pytest.raises(ValueError, match=r"encoder 'clip' is not in the store; it has \['t5'\]"):
        store.null("clip")
    assert store.null("t5").shape == (1, DIM)


def test_reading_and_verifying_need_no_torch(make: Make) -> None:
    made = make(dtype="bfloat16", num_captions=1)
    code = (
        "import sys\n"
        "from imagen_core.store import Store, verify_store\n"
        f"store = Store.open({str(made.path)!r})\n"
        "assert len(store[0].text['t5']) == len(store.null('t5')) == 1\n"
        f"assert verify_store({str(made.path)!r}).ok\n"
        "assert not {'torch', 'ray', 'transformers', 'img2dataset'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_sample_is_printed_with_shapes_instead_of_values(make: Make) -> None:
    made = make(num_captions=1)
    sample = st.Store.open(made.path)[0]
    printed = repr(sample)
    assert f"key={sample.key!r}" in printed
    assert "images={4: uint8[4, 4, 3], 8: uint8[8, 8, 3]}" in printed
    tokens, dim = sample.text["t5"][0].shape
    assert f"[{tokens}, {dim}]" in printed
    assert len(printed) < 1000


def test_columns_of_samples_are_read_for_all_rows_in_the_order_of_the_shards(make: Make) -> None:
    made = make(excluded={1: [0]})
    store = st.Store.open(made.path)
    columns = store.sample_columns(["height", "label"])
    assert columns["height"].to_pylist() == [480 + row for rows in (5, 3, 4) for row in range(rows)]
    assert columns["label"].null_count == 12
    with pytest.raises(ValueError, match="no column aesthetic"):
        store.sample_columns(["aesthetic"])
