"""What is exported is read back by the target's own library, and is bit for bit what the store gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core import store as st
from imagen_core.store import Sample, Store
from tests.commands import call
from tests.documents import blocks
from tests.imagen_core.store.arrays_added import add_arrays, values_of
from tests.imagen_core.store.caption_sets_added import add_caption_sets
from tests.imagen_core.store.handmade_store import make_store, rewrite_manifest
from tests.images import plain_png
from tests.runs import REPOSITORY, precompute
from tests.stages.exports.exporting import (
    DUPLICATE,
    REMOVED,
    TARGETS,
    as_array,
    assert_same,
    export,
    make_run,
    mds_samples,
    parquet_samples,
    skip_without,
    tar_samples,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("exported"), "store.format=hdf5")


def compare_parquet(row: dict[str, Any], sample: Sample) -> None:
    largest = max(sample.images)
    for size, pixels in sample.images.items():
        assert_same(np.asarray(row["image" if size == largest else f"image_{size}"]), pixels)
    assert (row["text"], row["captions"]) == (sample.captions[0], sample.captions)
    assert [row[name] for name in ("key", "url", "sha256", "width", "height", "label")] == [
        sample.key,
        sample.url,
        sample.sha256,
        sample.width,
        sample.height,
        sample.label,
    ]
    for encoder, rows in sample.text.items():
        found = row[f"embedding_{encoder}"]
        assert len(found) == len(rows)
        for values, expected in zip(found, rows, strict=True):
            assert_same(as_array(values, expected), expected)
    for name, array in sample.arrays.items():
        assert_same(as_array(row[f"array_{name}"], array), array)


def compare_tar(row: dict[str, Any], sample: Sample) -> None:
    largest = max(sample.images)
    for size, pixels in sample.images.items():
        assert_same(row["png" if size == largest else f"{size}.png"], pixels)
    assert (row["txt"], row["json"]["key"], row["json"]["captions"]) == (
        sample.captions[0],
        sample.key,
        sample.captions,
    )
    assert (row["json"]["url"], row["json"]["sha256"]) == (sample.url, sample.sha256)
    for encoder, rows in sample.text.items():
        for number, expected in enumerate(rows):
            assert_same(row[f"text-{encoder.lower()}.{number}.npy"], expected)
        assert f"text-{encoder.lower()}.{len(rows)}.npy" not in row
    for name, array in sample.arrays.items():
        assert_same(row[f"array-{name}.npy"], array)


def compare_mds(row: dict[str, Any], sample: Sample) -> None:
    largest = max(sample.images)
    for size, pixels in sample.images.items():
        assert_same(np.asarray(row["image" if size == largest else f"image_{size}"]), pixels)
    assert (row["key"], row["url"], row["sha256"]) == (sample.key, sample.url or "", sample.sha256)
    assert (row["original_width"], row["original_height"]) == (sample.width, sample.height)
    assert row["num_captions"] == len(sample.captions)
    for number, caption in enumerate(sample.captions):
        name = f"caption_{number}" if number else "caption"
        assert row[name] == caption
        for encoder, rows in sample.text.items():
            assert_same(row[f"latent_{name}_{encoder}"], rows[number])
            mask = row[f"attention_mask_{name}_{encoder}"]
            assert mask.sum() == len(rows[number])
            assert mask[: len(rows[number])].all()
    for name, array in sample.arrays.items():
        expected = np.atleast_1d(array.astype(np.uint8) if array.dtype == bool else array)
        assert_same(row[f"array_{name}"], expected)


READERS = {
    "parquet": (parquet_samples, compare_parquet),
    "webdataset": (tar_samples, compare_tar),
    "mds": (mds_samples, compare_mds),
}


def compare(target: str, out: Path, store: Store) -> list[dict[str, Any]]:
    read, compare_sample = READERS[target]
    rows = list(read(out))
    assert len(rows) == len(store)
    for row, sample in zip(rows, store, strict=True):
        compare_sample(row, sample)
    return rows


@pytest.mark.parametrize("target", TARGETS)
def test_each_sample_is_bit_for_bit_that_of_the_store(target: str, run: Path, tmp_path: Path) -> None:
    skip_without(target)
    assert export(run, target, tmp_path / "out").code == 0
    store = Store.open(run / "store")
    keys = [sample.key for sample in store]
    assert len(keys) == 7
    assert not {REMOVED, DUPLICATE} & set(keys)
    assert {len(sample.captions) for sample in store} == {1, 2, 3}
    compare(target, tmp_path / "out", store)
    for encoder in store.encoders:
        assert_same(np.load(tmp_path / f"out/data/null-text-{encoder}.npy"), store.null(encoder))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_embeddings_of_other_dtypes_are_exact_as_float32(target: str, dtype: Any, tmp_path: Path) -> None:
    skip_without(target)
    made = make_store(tmp_path / "store", dtype=dtype, excluded={0: [1], 2: [0, 3]})
    assert export(made.path, target, tmp_path / "out").code == 0
    rows = compare(target, tmp_path / "out", Store.open(made.path))
    assert len(rows) == 9


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("apart", [{"layers": (9, 3, 18)}, {"num_scales": 4}])
def test_int8_layers_are_those_of_the_store(target: str, apart: dict[str, Any], tmp_path: Path) -> None:
    skip_without(target)
    made = make_store(tmp_path / "store", dtype="int8", **apart)
    assert export(made.path, target, tmp_path / "out").code == 0
    compare(target, tmp_path / "out", Store.open(made.path))


@pytest.mark.parametrize("target", TARGETS)
def test_arrays_of_any_shape_are_exported(target: str, tmp_path: Path) -> None:
    skip_without(target)
    made = make_store(tmp_path / "store", excluded={1: [2]})
    specs = {
        "score": st.ArraySpec("float32"),
        "mask": st.ArraySpec("bool", (2, 3)),
        "latents": st.ArraySpec("bfloat16", (2, 3, 2)),
        **({} if target == "mds" else {"ragged": st.ArraySpec("int32", (None, 2))}),
    }
    for name, spec in specs.items():
        add_arrays(made.path, name, spec, values_of(spec), "parquet")
    assert export(made.path, target, tmp_path / "out").code == 0
    compare(target, tmp_path / "out", Store.open(made.path))


@pytest.mark.parametrize("target", TARGETS)
def test_images_of_aspect_ratio_buckets_keep_their_shapes(target: str, tmp_path: Path) -> None:
    skip_without(target)
    made = make_store(tmp_path / "store", buckets=True)
    assert export(made.path, target, tmp_path / "out").code == 0
    compare(target, tmp_path / "out", Store.open(made.path))


def short_captions(_: int, row: int) -> list[str]:
    return [[], ["one"], ["three", "drei"], ["empty", "one"]][row % 4]


@pytest.mark.parametrize("target", TARGETS)
def test_captions_of_further_sets_go_out_with_their_embeddings(target: str, tmp_path: Path) -> None:
    skip_without(target)
    made = make_store(tmp_path / "store", dtype="float16", excluded={1: [2]})
    add_caption_sets(made.path, {"short": short_captions}, {"long": 0.8, "short": 0.2})
    assert export(made.path, target, tmp_path / "out").code == 0
    store = Store.open(made.path)
    assert {len(sample.caption_sets["short"]) for sample in store} == {0, 1, 2}
    for row, sample in zip(compare(target, tmp_path / "out", store), store, strict=True):
        captions, rows = sample.caption_sets["short"], sample.set_texts["short"]["t5"]
        if target == "parquet":
            assert row["captions_short"] == captions
            found = [as_array(values, like) for values, like in zip(row["embedding_t5_short"], rows, strict=True)]
        elif target == "webdataset":
            assert row["json"]["caption_sets"] == {"short": captions}
            assert f"text-t5-short.{len(rows)}.npy" not in row
            found = [row[f"text-t5-short.{number}.npy"] for number in range(len(rows))]
        else:
            names = [name for name in ("caption_short", "caption_short_1") if name in row]  # those of the row's shard
            assert len(names) >= max(1, len(captions))
            assert [row[name] for name in names] == [*captions, "", ""][: len(names)]
            found = [row[f"latent_{name}_t5"] for name in names]
            masks = [row[f"attention_mask_{name}_t5"] for name in names]
            rows = [*rows, *[np.empty((0, 16), np.float16)] * 2][: len(names)]
            assert [mask.sum() for mask in masks] == [len(array) for array in rows]
            lacking = [array for array, like in zip(found, rows, strict=True) if not len(like)]
            assert all(array.shape == (1, 16) and np.isnan(array).all() for array in lacking)
            found = [array[: len(like)] for array, like in zip(found, rows, strict=True)]
        for array, expected in zip(found, rows, strict=True):
            assert_same(array, expected)
    described = json.loads((tmp_path / "out/data/store.json").read_text())["caption_sets"]
    assert [(each["name"], each["weight"]) for each in described] == [("long", 0.8), ("short", 0.2)]
    assert [each["name"] for each in described[1]["encoders"]] == ["t5"]


def test_further_sets_can_be_left_out_and_must_if_their_columns_have_the_name_of_another(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store")
    add_caption_sets(made.path, {"1": short_captions, "short": short_captions}, {"long": 1, "1": 1, "short": 1})
    settings = ("--executor", "inline", "--quiet", f"store={made.path}")
    refused = call("run", "export", "--out", str(tmp_path / "out"), *settings, "to=mds")
    assert refused.code == 2
    assert "caption_sets: a column of 1 would have the name of another one" in refused.err
    few = call("run", "export", "--out", str(tmp_path / "out"), *settings, "to=parquet", "caption_sets=[long,short]")
    assert few.code == 0
    row = next(iter(parquet_samples(tmp_path / "out")))
    assert [name for name in row if name.startswith("captions")] == ["captions", "captions_short"]
    assert [name for name in row if name.startswith("embedding")] == ["embedding_t5", "embedding_t5_short"]


@pytest.mark.parametrize(
    ("codec", "target", "option", "is_kept"),
    [
        ("png", "webdataset", None, True),
        ("jpeg", "webdataset", None, True),
        ("webp", "parquet", None, True),
        ("webp", "webdataset", None, False),
        ("jpeg", "webdataset", "png", False),
        ("png", "parquet", None, True),
    ],
)
def test_encoded_images_go_out_unchanged_where_the_target_reads_them(
    codec: Any, target: str, option: str | None, is_kept: bool, tmp_path: Path
) -> None:
    made = make_store(tmp_path / "store", codec=codec, sizes=(8,))
    options = [] if option is None else ["--codec", option]
    assert export(made.path, target, tmp_path / "out", *options).code == 0
    store = Store.open(made.path)
    stored = [
        store.shard(shard).images[8].stored(row).tobytes() for shard, row in map(store.locate, range(len(store)))
    ]
    exported = b"".join(path.read_bytes() for path in sorted((tmp_path / "out/data").glob("0*")))
    assert all((data in exported) == is_kept for data in stored)
    if target == "webdataset":
        suffix = "jpg" if codec == "jpeg" and is_kept else "png"
        rows = [row[suffix] for row in tar_samples(tmp_path / "out")]
    else:
        rows = [np.asarray(row["image"]) for row in parquet_samples(tmp_path / "out")]
    for row, sample in zip(rows, store, strict=True):
        assert_same(row, sample.images[8])


def test_the_examples_of_the_page_read_an_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for target, folder in (("webdataset", "EXPORTS/tars"), ("parquet", "EXPORTS/parquet")):
        assert export(run, target, folder).code == 0
    examples = blocks("py", [REPOSITORY / "docs/how-to/export.md"])
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "<example>", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.count("image number 0") == 2


def test_a_selection_has_only_these_sizes_and_encoders(run: Path, tmp_path: Path) -> None:
    options = ["--size", "16", "--encoder", "t5", "--dtype", "float32"]
    assert export(run, "parquet", tmp_path / "out", *options).code == 0
    rows = list(parquet_samples(tmp_path / "out"))
    assert rows[0]["image"].size == (16, 16)
    assert [name for name in rows[0] if name.startswith(("image", "embedding"))] == ["image", "embedding_t5"]
    described = json.loads((tmp_path / "out/data/store.json").read_text())
    assert [(e["name"], e["dtype"], e["dtype_in_store"]) for e in described["encoders"]] == [
        ("t5", "float32", "float16")
    ]
    assert described["encoders"][0]["fingerprint"]["max_tokens"] == 16
    assert [image["size_px"] for image in described["images"]] == [16]
    manifest = json.loads((run / "store/manifest.json").read_text())
    assert (described["store"]["sha256"], described["num_samples"]) == (manifest["sha256"], 7)


def test_embeddings_beyond_float16_are_counted_drops(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", dtype="float32", num_captions=1, shard_rows=(3,))
    captions = list(dict.fromkeys(captions[0] for captions in made.captions))  # the first one is of two samples
    embeddings = [np.full((1, 16), value, np.float32) for value in (1e5, 1.0)]
    st.write_embedding_shard(
        made.path / "text-t5/00000.parquet",
        st.cast_embeddings(embeddings, 16, "float32"),
        [1, 1],
        16,
        "float32",
        "parquet",
        captions=captions,
        fingerprint={"model": "tiny"},
    )
    rewrite_manifest(made.path)
    assert export(made.path, "webdataset", tmp_path / "out", "--dtype", "float16").code == 0
    lines = (tmp_path / "out/quarantine/export/00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["non_finite_embedding"] * 2
    assert len(list(tar_samples(tmp_path / "out"))) == 1


def test_a_caption_that_a_sample_lacks_is_left_out_by_prx(run: Path, tmp_path: Path) -> None:
    skip_without("mds")
    assert export(run, "mds", tmp_path / "out").code == 0
    for row in mds_samples(tmp_path / "out"):
        for number in range(row["num_captions"], 3):
            assert row[f"caption_{number}"] == ""
            assert np.isnan(row[f"latent_caption_{number}_t5"]).all()  # PRX removes what has a NaN before it chooses
            assert not row[f"attention_mask_caption_{number}_t5"].any()
        assert row["attention_mask_caption_t5"].shape == (16,)
        assert row["attention_mask_caption_T5.long"].shape == (32,)


def test_kept_columns_whose_names_are_taken_stay_apart(tmp_path: Path) -> None:
    rows = [
        {"image": plain_png(), "caption": f"c{i}", "text": f"t{i}", "column_text": i, "x": i / 2} for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "l.parquet")
    precompute(
        tmp_path / "run",
        "source.kind=parquet",
        f"source.path={tmp_path / 'l.parquet'}",
        "source.keep_columns=[text,column_text,x]",
        "images.sizes_px=[8]",
        "encoders=[]",
    )
    result = export(tmp_path / "run", "parquet", tmp_path / "out")
    assert result.code == 0
    names = ("text", "column_column_text", "column_text", "x")
    found = pq.read_table(tmp_path / "out" / "data" / "00000.parquet").select(names).to_pylist()
    assert [tuple(row.values()) for row in found] == [(f"c{i}", f"t{i}", i, i / 2) for i in range(3)]
