"""Layers of embeddings that are stored apart, and int8 scales of several layers that are not."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from imagen_core import store as st
from imagen_core.store.files.shard import open_embeddings
from imagen_core.store.removal.erase import ErasedShard
from tests.imagen_core.store.handmade_store import DIM, FINGERPRINT, Made, rewrite_manifest

Make = Callable[..., Made]
LAYERS = (2, 5, 33)
DTYPES: list[st.StoreDtype] = ["float16", "bfloat16", "float32", "int8"]


def check_equal(found: np.ndarray, x: np.ndarray, dtype: st.StoreDtype) -> None:
    """What was stored of x (n_tokens, layers, dim)."""
    assert found.shape == x.shape
    if dtype == "int8":  # of each layer, though one is a hundred times as large as another
        assert (np.abs(found - x) <= np.abs(x).max(axis=2, keepdims=True) / 127 * 0.5001).all()
    else:
        tolerance = {"float16": 1e-3, "bfloat16": 4e-3, "float32": 0}[dtype]
        np.testing.assert_allclose(found, x, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_layers_are_read_as_tokens_by_layers_by_width_and_each_alone(
    make: Make, store_format: st.StoreFormat, dtype: st.StoreDtype
) -> None:
    made = make(store_format=store_format, dtype=dtype, layers=LAYERS)
    store = st.Store.open(made.path)
    for sample, texts in zip(store, made.text, strict=True):
        for found, x in zip(sample.text["t5"], texts, strict=True):
            check_equal(found, x, dtype)
    check_equal(store.null("t5"), made.null, dtype if dtype != "int8" else "float16")
    file = store.shard(0).text["t5"]
    every = st.restore(file.stored(1), dtype)
    for wanted, places in (((33, 2), [2, 0]), ((5,), [1])):
        np.testing.assert_array_equal(st.restore(file.stored(1, wanted), dtype), every[:, places])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loader_reads_the_chosen_layers_in_their_order(
    make: Make, store_format: st.StoreFormat, dtype: st.StoreDtype
) -> None:
    store = st.Store.open(make(store_format=store_format, dtype=dtype, layers=LAYERS, num_captions=1).path)
    options: dict[str, Any] = {"batch_size": 5, "text": "t5", "max_tokens": 4, "seed": 3}
    batches = zip(store.loader(**options), store.loader(text_layers=[33, 2], **options), strict=True)
    for every, some in batches:
        assert every["text"].shape == (*every["text_mask"].shape, 3, DIM)
        assert every["text"].dtype == some["text"].dtype
        assert (some["text"] == every["text"][:, :, [2, 0]]).all()
        assert (some["text_mask"] == every["text_mask"]).all()
        assert not every["text"][~every["text_mask"]].any()


class Counting(io.BytesIO):
    """Bytes of a file that are read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.num_read += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer)
        self.num_read += count
        return count


def test_of_layers_that_are_not_asked_for_no_bytes_are_read(tmp_path: Path, store_format: st.StoreFormat) -> None:
    layers, dim, tokens = tuple(range(16)), 2048, 64
    group = st.TextGroup("text-t5", "t5", dim, "int8", store_format, layers=layers)
    x = np.random.default_rng(0).normal(size=(tokens, len(layers), dim)).astype(np.float32)
    path, stored = tmp_path / "text", st.cast_embedding(x, "int8")
    st.write_embedding_shard(
        path, [stored], [tokens], dim, "int8", store_format, captions=["a"], fingerprint={}, layers=layers
    )
    file = Counting(path.read_bytes())
    found = open_embeddings(file, "text", group).stored(0, [3])
    np.testing.assert_array_equal(found.values[:, 0], stored.values[:, 3])
    assert tokens * dim <= file.num_read <= 2.5 * tokens * dim
    assert path.stat().st_size > 16 * tokens * dim


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_layers", [3, 12])
def test_the_bytes_of_layers_are_predicted(
    tmp_path: Path, store_format: st.StoreFormat, dtype: st.StoreDtype, num_layers: int
) -> None:
    lengths, layers = [(7 * i) % 40 for i in range(80)], tuple(range(num_layers))
    rng, path = np.random.default_rng(0), tmp_path / "text"
    cast = st.cast_embeddings(
        (rng.normal(size=(n, num_layers, 256)) for n in lengths), 256, dtype, num_layers=num_layers
    )
    names = [str(i) for i in range(len(lengths))]
    st.write_embedding_shard(
        path, cast, lengths, 256, dtype, store_format, captions=names, fingerprint={}, layers=layers
    )
    predicted = st.embedding_shard_bytes(lengths, 256, dtype, num_layers=num_layers)
    assert predicted == pytest.approx(path.stat().st_size, rel=0.01)


@pytest.mark.parametrize("options", [{"layers": LAYERS}, {"dtype": "int8", "num_scales": 4}])
def test_a_store_that_earlier_versions_would_misread_has_a_schema_that_they_refuse(
    make: Make, store_format: st.StoreFormat, options: dict[str, Any]
) -> None:
    made = make(store_format=store_format, **options)
    assert st.Store.open(made.path).manifest.schema_version == 3
    rewrite_manifest(made.path)
    assert st.Store.open(made.path).manifest.schema_version == 3
    assert st.Store.open(make("plain", store_format=store_format).path).manifest.schema_version == 2


@pytest.mark.parametrize("options", [{"layers": LAYERS, "dtype": "bfloat16"}, {"dtype": "int8", "num_scales": 4}])
def test_verify_passes_and_finds_exchanged_rows(
    make: Make, store_format: st.StoreFormat, options: dict[str, Any]
) -> None:
    made = make(store_format=store_format, **options)
    assert st.verify_store(made.path).problems == []
    path = made.path / st.shard_path("text-t5", 0, store_format)
    group = st.Store.open(made.path).text_group("t5")
    file = open_embeddings(str(path), "text", group)
    rows = [file.stored(row) for row in (1, 0, *range(2, file.num_rows))]
    copies = [st.StoredEmbedding(r.values.copy(), None if r.scales is None else r.scales.copy()) for r in rows]
    captions = [f"other {i}" for i in range(len(rows))]
    st.write_embedding_shard(
        path,
        copies,
        [len(row.values) for row in copies],
        group.dim,
        group.dtype,
        store_format,
        captions=captions,
        fingerprint=FINGERPRINT,
        layers=group.layers,
        num_scales=group.num_scales,
    )
    rewrite_manifest(made.path)
    (problem,) = st.verify_store(made.path).problems
    assert "embeddings do not belong to their captions" in problem.message


def test_a_file_of_other_layers_than_the_manifests_is_refused(make: Make, store_format: st.StoreFormat) -> None:
    made = make(store_format=store_format, layers=LAYERS)
    path = made.path / "manifest.json"
    header = json.loads(path.read_bytes())
    header["groups"]["text-t5"]["layers"] = [2, 5, 34]
    rewrite_manifest(made.path, groups=header["groups"])
    with pytest.raises(st.StoreError, match=r"holds \(layers, scales per token\) \(\(2, 5, 33\), 1\), not"):
        st.Store.open(made.path)[0]


@pytest.mark.parametrize("options", [{"layers": LAYERS}, {"num_scales": 4}])
def test_an_erased_shard_has_the_layers_of_the_other_rows_as_they_were(
    make: Make, store_format: st.StoreFormat, options: dict[str, Any]
) -> None:
    made = make(store_format=store_format, dtype="int8", **options)
    store = st.Store.open(made.path)
    group, samples = store.text_group("t5"), str(made.path / "samples/00000.parquet")
    old = str(made.path / st.shard_path("text-t5", 0, store_format))
    erased = ErasedShard.of(0, st.SamplesFile(samples, samples), {4})
    new = made.path / "new"
    erased.write(group, old, new)
    before, after = (open_embeddings(str(path), "text", group) for path in (old, new))
    assert erased.erased_ids
    for row in range(before.num_rows):
        one, other = before.stored(row), after.stored(row)
        if row in erased.erased_ids:
            assert other.values.shape == (0, *group.token_shape)
        else:
            np.testing.assert_array_equal(other.values, one.values)
            np.testing.assert_array_equal(other.scales, one.scales)


def test_the_files_have_one_column_or_dataset_per_layer(make: Make) -> None:
    path = make("a", store_format="parquet", dtype="int8", layers=LAYERS).path / "text-t5/00000.parquet"
    names = ["num_tokens", "embedding_2", "embedding_5", "embedding_33", "digest", "scale_2", "scale_5", "scale_33"]
    assert pq.read_schema(path).names == names
    with h5py.File(make("b", store_format="hdf5", layers=LAYERS).path / "text-t5/00000.h5") as file:
        assert set(file) == {"tokens_2", "tokens_5", "tokens_33", "offsets", "digests"}


def test_int8_layers_side_by_side_keep_their_accuracy_with_a_scale_each() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(9, DIM)) * size for size in (0.01, 1, 100)], axis=1).astype(np.float32)
    stored = st.cast_embedding(x, "int8", 3)
    assert stored.scales is not None
    assert stored.scales.shape == (9, 3)
    alone = [st.restore(st.cast_embedding(part, "int8"), "int8") for part in np.split(x, 3, axis=1)]
    np.testing.assert_array_equal(st.restore(stored, "int8"), np.concatenate(alone, axis=1))
    one = st.restore(st.cast_embedding(x, "int8"), "int8")
    assert not one[:, :DIM].any()  # the smallest layer is lost with one scale per token


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 1]}, r"layers must differ \(got \[1, 1\]\)"),
        ({"layers": [-1]}, "layers must be an integer of 0 or more"),
        ({"num_scales": 2}, "num_scales is 2, which needs int8"),
        ({"dtype": "int8", "num_scales": 3}, "num_scales is 3, which needs int8 without layers, and a dim that"),
    ],
)
def test_a_group_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    raw = {"kind": "text", "encoder": "t5", "dim": 16, "dtype": "float16", "format": "hdf5"}
    with pytest.raises(ValueError, match=message):
        st.parse_group("text-t5", raw | changes)


def test_layers_that_a_store_lacks_are_refused_by_number(make: Make) -> None:
    store = st.Store.open(make(layers=LAYERS).path)
    with pytest.raises(ValueError, match=r"text-t5: layers \[5, 6\] cannot be read; it has the layers \[2, 5, 33\]"):
        store.loader(batch_size=1, text="t5", text_layers=[5, 6])
    with pytest.raises(ValueError, match=r"text_layers are \[5\], but no text is loaded"):
        store.loader(batch_size=1, text_layers=[5])
    plain = st.Store.open(make("plain").path)
    with pytest.raises(ValueError, match=r"layers \[5\] cannot be read; its layers are not stored apart"):
        plain.loader(batch_size=1, text="t5", text_layers=[5])
