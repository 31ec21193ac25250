"""The page on the store's format is true: the program on it reads stores without this package."""

import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from imagen_core import store as st
from imagen_core.store.files.shard import read_digests
from tests.documents import python_blocks
from tests.imagen_core.store.arrays_added import add_arrays, values_of
from tests.imagen_core.store.handmade_store import Made, remove
from tests.runs import REPOSITORY, precompute
from tests.stages.encoders import tiny_models

Make = Callable[..., Made]
PAGE = REPOSITORY / "docs" / "reference" / "store-format.md"
DTYPES = ["float16", "bfloat16", "float32", "int8"]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the program on the page defines. It imports nothing of this package."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in python_blocks(PAGE):
        assert not any(package in block for package in ("imagen_core", "pipeline", "stages"))
        exec(block, names)
    return names


def assert_same(found: list[dict[str, Any]], store: st.Store) -> None:
    assert len(found) == len(store) > 0
    for mine, sample in zip(found, store, strict=True):
        for name in ("key", "captions", "url", "sha256", "width", "height"):
            assert mine[name] == getattr(sample, name)
        assert mine.get("transcription") == sample.transcription
        assert mine.get("label") == sample.label
        box = mine.get("safebox")
        assert (box and tuple(box)) == sample.safebox
        assert mine["images"].keys() == sample.images.keys()
        for size, pixels in sample.images.items():
            np.testing.assert_array_equal(mine["images"][size], pixels, strict=True)
        assert mine["text"].keys() == sample.text.keys()
        for encoder, rows in sample.text.items():
            assert len(mine["text"][encoder]) == len(rows) == len(sample.captions)
            for a, b in zip(mine["text"][encoder], rows, strict=True):
                np.testing.assert_array_equal(a, b, strict=True)
        assert mine["image_embeds"].keys() == sample.image_embeds.keys()
        for encoder, vector in sample.image_embeds.items():
            np.testing.assert_array_equal(mine["image_embeds"][encoder], vector, strict=True)
        assert mine["arrays"].keys() == sample.arrays.keys()
        for name, array in sample.arrays.items():
            np.testing.assert_array_equal(mine["arrays"][name], array, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pages_reader_reads_every_dtype_in_both_formats(
    page: dict[str, Any], make: Make, store_format: st.StoreFormat, dtype: st.StoreDtype
) -> None:
    made = make(store_format=store_format, dtype=dtype, excluded={1: [0]})
    store = st.Store.open(made.path)
    found = list(page["read_store"](made.path))
    assert_same(found, store)
    assert [sample["key"] for sample in found] == made.keys
    group = page["read_manifest"](made.path)["groups"]["text-t5"]
    np.testing.assert_array_equal(page["read_null"](made.path, group), store.null("t5"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pages_reader_and_digests_know_layers_in_both_formats(
    page: dict[str, Any], make: Make, store_format: st.StoreFormat, dtype: st.StoreDtype
) -> None:
    made = make(store_format=store_format, dtype=dtype, layers=(9, 18, 27))
    store = st.Store.open(made.path)
    assert_same(list(page["read_store"](made.path)), store)
    group = page["read_manifest"](made.path)["groups"]["text-t5"]
    np.testing.assert_array_equal(page["read_null"](made.path, group), store.null("t5"))
    stored = store.shard(0).text["t5"].stored(0)
    parts = [np.ascontiguousarray(stored.values[:, layer]) for layer in range(3)]
    parts += [] if stored.scales is None else [np.ascontiguousarray(stored.scales[:, layer]) for layer in range(3)]
    maker = page["fingerprint_digest"](group["fingerprint"]).encode()
    expected = page["row_digest"](maker, made.captions[0][0].encode(), *parts)
    digests = read_digests(str(made.path / f"text-t5/00000{st.file_suffix(store_format)}"), "text", store_format)
    assert digests is not None
    assert int(digests[0]) == expected


def test_the_pages_reader_knows_several_scales_per_token(
    page: dict[str, Any], make: Make, store_format: st.StoreFormat
) -> None:
    made = make(store_format=store_format, dtype="int8", num_scales=4)
    assert_same(list(page["read_store"](made.path)), st.Store.open(made.path))


@pytest.mark.parametrize("codec", ["png", "webp", "jpeg"])
def test_the_pages_reader_decodes_every_codec_in_both_formats(
    page: dict[str, Any], make: Make, store_format: st.StoreFormat, codec: st.Codec
) -> None:
    made = make(store_format=store_format, codec=codec)
    assert_same(list(page["read_store"](made.path)), st.Store.open(made.path))


@pytest.mark.parametrize("codec", ["raw", "png"])
def test_the_pages_reader_reads_images_of_buckets_in_both_formats(
    page: dict[str, Any], make: Make, store_format: st.StoreFormat, codec: st.Codec
) -> None:
    made = make(store_format=store_format, codec=codec, buckets=True)
    found = list(page["read_store"](made.path))
    assert_same(found, st.Store.open(made.path))
    assert {sample["images"][8].shape for sample in found} == {(10, 6, 3), (8, 8, 3), (6, 10, 3)}


def test_the_pages_reader_and_digests_know_arrays_in_both_formats(
    page: dict[str, Any], make: Make, store_format: st.StoreFormat
) -> None:
    made = make(store_format=store_format, excluded={0: [1]})
    specs = [st.ArraySpec("float32"), st.ArraySpec("bool", (None, None)), st.ArraySpec("bfloat16", (4, 2))]
    for name, spec in zip("abc", specs, strict=True):
        groups = add_arrays(made.path, name, spec, values_of(spec), store_format)
    assert_same(list(page["read_store"](made.path)), st.Store.open(made.path))
    path = made.path / st.shard_path("array-b", 0, store_format)
    maker = page["fingerprint_digest"](groups["array-b"]["fingerprint"]).encode()
    arrays = [(np.array(value.shape, "<i4"), value.tobytes()) for value in values_of(specs[1])[:5]]
    keys = pq.read_table(made.path / "samples/00000.parquet")["key"].to_pylist()
    expected = [page["row_digest"](maker, key.encode(), *array) for key, array in zip(keys, arrays, strict=True)]
    if store_format == "parquet":
        assert pq.read_table(path)["digest"].to_pylist() == expected
    else:
        with h5py.File(path) as file:
            assert file["digests"][()].tolist() == expected


@pytest.mark.parametrize("listed", [False, True], ids=["tombstone", "in the manifest"])
def test_the_pages_reader_leaves_removed_samples_out(page: dict[str, Any], make: Make, listed: bool) -> None:
    made = make(excluded={2: [1]})
    remove(made.path, key=["000-003"], listed=listed)
    found = list(page["read_store"](made.path))
    assert_same(found, st.Store.open(made.path))
    assert "000-003" not in [sample["key"] for sample in found]
    assert len(found) == len(made.keys) - 1


def test_the_pages_reader_refuses_a_changed_manifest(page: dict[str, Any], make: Make) -> None:
    made = make()
    path = made.path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"writer":"test"', b'"writer":"tesT"'))
    with pytest.raises(ValueError, match=r"manifest.json was changed"):
        list(page["read_store"](made.path))


def test_the_pages_digests_are_those_in_the_files(
    page: dict[str, Any], make: Make, store_format: st.StoreFormat
) -> None:
    made = make(store_format=store_format, dtype="int8", codec="png")
    digest, samples = page["row_digest"], pq.read_table(made.path / "samples/00000.parquet").to_pylist()
    manifest = page["read_manifest"](made.path)
    encoder = page["fingerprint_digest"](manifest["groups"]["text-t5"]["fingerprint"])
    captions = {i: text for s in samples for i, text in zip(s["caption_ids"], s["captions"], strict=True)}
    files = manifest["shards"][0]["files"]
    image_path, text_path = made.path / files["images-8"]["path"], made.path / files["text-t5"]["path"]
    if store_format == "parquet":
        images, text = pq.read_table(image_path), pq.read_table(text_path)
        stored = images["picture"].to_pylist()
        rows = list(zip(text["embedding"].to_pylist(), text["scale"].to_pylist(), strict=True))
        digests = (images["digest"].to_pylist(), text["digest"].to_pylist())
        assert pq.ParquetFile(text_path).metadata.metadata[b"fingerprint"] == encoder.encode()
    else:
        with h5py.File(image_path) as file:
            ends = file["offsets"][()]
            stored = [file["pictures"][a:b].tobytes() for a, b in pairwise(ends)]
            image_digests = file["digests"][()].tolist()
        with h5py.File(text_path) as file:
            ends = file["offsets"][()]
            rows = [(file["tokens"][a:b].tobytes(), file["scales"][a:b].tobytes()) for a, b in pairwise(ends)]
            digests = (image_digests, file["digests"][()].tolist())
            assert file.attrs["fingerprint"] == encoder.encode()
    assert digests[0] == [
        digest(s["key"].encode(), s["sha256"].encode(), data) for s, data in zip(samples, stored, strict=True)
    ]
    assert digests[1] == [digest(encoder.encode(), captions[i].encode(), *row) for i, row in enumerate(rows)]


def test_the_page_lists_every_column_and_key_that_a_run_writes(page: dict[str, Any], tmp_path: Path) -> None:
    """Of a run with transcriptions and image embeddings, in HDF5 with an encoded size."""
    tiny_models.clip(tmp_path / "clip")
    image_encoder = f"image_encoders=[{{name: clip, kind: clip, model: {tmp_path / 'clip'}, from_px: 32}}]"
    small = ["source.num_samples=8", "source.scene=words", "shard_size=4", "images.sizes_px=[16,32]"]
    precompute(
        tmp_path / "run", *small, image_encoder, "images.codec={32: png}", "store.format=hdf5", "max_drop_fraction=1"
    )
    root = tmp_path / "run" / "store"
    found = list(page["read_store"](root))
    assert_same(found, st.Store.open(root))
    assert found[0]["transcription"]
    assert found[0]["image_embeds"].keys() == {"clip"}
    text = PAGE.read_text("utf-8")
    manifest = json.loads((root / "manifest.json").read_bytes())
    for name in (*manifest, *manifest["shards"][0], *pq.read_schema(root / "samples/00000.parquet").names):
        assert f"`{name}`" in text, name
    for group in manifest["groups"].values():
        assert f"`{group['kind']}`" in text
    for file in manifest["shards"][0]["files"].values():
        data = (root / file["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])


def test_the_page_lists_every_column_of_samples(tmp_path: Path) -> None:
    path, rest = tmp_path / "samples.parquet", ("0" * 64, 4, 4, 0)
    st.write_samples(path, [st.SampleRow("a", ("b",), (0,), None, *rest, "written", (0, 1, 2, 3), 7)])
    (row,) = pq.read_table(path).to_pylist()
    assert (row["transcription"], row["safebox"], row["label"]) == ("written", [0, 1, 2, 3], 7)
    text = PAGE.read_text("utf-8")
    assert [name for name in row if f"`{name}`" not in text] == []
