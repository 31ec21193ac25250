"""Files of one shard: what was written is what is read, in few and always the same bytes."""

import errno
import gc
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs
from hypothesis.extra import numpy as hnp

from imagen_core import store as st
from imagen_core.store.files.images import open_images
from imagen_core.store.files.parquet import ParquetEmbeddings
from imagen_core.store.files.shard import open_embeddings
from tests.imagen_core.store.handmade_store import write_text

DTYPES: list[st.StoreDtype] = ["float16", "bfloat16", "float32", "int8"]
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}
ROWS = [
    st.SampleRow("a", ("one", "zwei é\n"), (0, 1), "https://example.com/a.jpg", "00" * 32, 10, 20, 0),
    st.SampleRow("b", ("one",), (0,), None, "ff" * 32, 30000, 1, 1),
]


def embeddings(lengths: list[int], dim: int = 16, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, dim)) * 10 ** rng.uniform(-3, 3)).astype(np.float32) for n in lengths]


def text_group(dtype: st.StoreDtype, store_format: st.StoreFormat, dim: int = 16) -> st.TextGroup:
    return st.TextGroup("text-t5", "t5", dim, dtype, store_format)


def expected(x: np.ndarray, dtype: st.StoreDtype) -> np.ndarray:
    if dtype == "bfloat16":
        import torch

        return torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    return x.astype(np.float16) if dtype == "float16" else x


def check_restored(x: np.ndarray, restored: np.ndarray, dtype: st.StoreDtype) -> None:
    assert restored.shape == x.shape
    assert restored.dtype == (np.float16 if dtype == "float16" else np.float32)
    if dtype == "int8":
        scale = np.abs(x).max(axis=1, keepdims=True, initial=0) / 127
        assert (np.abs(restored - x) <= scale * 0.5001).all()
    else:
        np.testing.assert_array_equal(restored, expected(x, dtype))


def test_samples_roundtrip(tmp_path: Path) -> None:
    st.write_samples(tmp_path / "s.parquet", ROWS)
    assert st.read_samples(tmp_path / "s.parquet") == ROWS


def test_a_column_that_only_some_samples_have_roundtrips_and_is_left_out_where_none_has_it(tmp_path: Path) -> None:
    written = [
        replace(ROWS[0], transcription="two\nlines é", safebox=(-1, 2, 3, 40000)),
        ROWS[1],
        replace(ROWS[1], transcription="", input_row=2),
    ]
    st.write_samples(tmp_path / "s.parquet", written)
    assert st.read_samples(tmp_path / "s.parquet") == written
    st.write_samples(tmp_path / "t.parquet", ROWS)
    data = (tmp_path / "t.parquet").read_bytes()
    assert b"transcription" not in data
    assert b"safebox" not in data


def test_no_samples_roundtrip(tmp_path: Path) -> None:
    st.write_samples(tmp_path / "s.parquet", [])
    assert st.read_samples(tmp_path / "s.parquet") == []


def test_samples_need_one_id_a_caption(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'x': 1 captions and 2 caption_ids"):
        st.write_samples(tmp_path / "s.parquet", [st.SampleRow("x", ("a",), (0, 1), None, "", 1, 1, 0)])


def test_an_unreadable_samples_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(st.StoreError, match=r"s\.parquet: not readable as parquet"):
        st.read_samples(tmp_path / "s.parquet")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[3, 0, 1, 7], [0, 0], []])
def test_text_roundtrip(
    tmp_path: Path, store_format: st.StoreFormat, dtype: st.StoreDtype, lengths: list[int]
) -> None:
    xs = embeddings(lengths)
    path = tmp_path / "text"
    write_text(path, xs, 16, dtype, store_format)
    with open(path, "rb") as remote:
        for source in (str(path), remote):
            file = open_embeddings(source, "text", text_group(dtype, store_format))
            assert file.num_tokens.tolist() == lengths
            for row, x in enumerate(xs):
                check_restored(x, st.restore(file.stored(row), dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_text_of_many_row_groups_roundtrips(
    tmp_path: Path, store_format: st.StoreFormat, dtype: st.StoreDtype
) -> None:
    xs = embeddings([(i * 37) % 90 for i in range(60)], dim=512)
    path = tmp_path / "text"
    write_text(path, xs, 512, dtype, store_format)
    for mapped in (True, False):
        file = open_embeddings(str(path), "text", text_group(dtype, store_format, 512), mapped=mapped)
        for row in [59, 0, *range(60)]:
            check_restored(xs[row], st.restore(file.stored(row), dtype), dtype)


@settings(max_examples=60, deadline=None)
@given(
    x=hnp.arrays(
        np.float32,
        hs.tuples(hs.integers(0, 5), hs.integers(1, 6)),
        elements=hs.floats(-60000, 60000, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30),
    ),
    dtype=hs.sampled_from(DTYPES),
)
def test_cast_and_restore_keep_any_embedding(x: np.ndarray, dtype: st.StoreDtype) -> None:
    assert st.is_finite_as(x, dtype)
    check_restored(x, st.restore(st.cast_embedding(x, dtype), dtype), dtype)


@pytest.mark.parametrize(
    ("value", "dtypes"),
    [
        (65504.0, {"float16", "bfloat16", "float32", "int8"}),
        (65519.0, {"float16", "bfloat16", "float32", "int8"}),
        (65520.0, {"bfloat16", "float32"}),
        (-65520.0, {"bfloat16", "float32"}),
        (3.3895e38, {"bfloat16", "float32"}),
        (3.4e38, {"float32"}),
        (np.inf, set()),
        (-np.inf, set()),
        (np.nan, set()),
    ],
)
def test_is_finite_as_agrees_with_the_cast(value: float, dtypes: set[str]) -> None:
    x = np.array([[0.0, value]], dtype=np.float32)
    assert {dtype for dtype in DTYPES if st.is_finite_as(x, dtype)} == dtypes


def test_a_token_of_zeros_quantises_to_zeros() -> None:
    x = np.array([[0, 0], [127, -63.5]], dtype=np.float32)
    stored = st.cast_embedding(x, "int8")
    assert stored.values.tolist() == [[0, 0], [127, -64]]
    assert stored.scales is not None
    assert stored.scales.tolist() == [0.0, 1.0]


def test_a_non_finite_embedding_is_refused_by_row(tmp_path: Path, store_format: st.StoreFormat) -> None:
    xs = embeddings([2, 2])
    xs[1][0, 0] = np.nan
    with pytest.raises(ValueError, match=r"row 1: .*not finite as float16"):
        write_text(tmp_path / "text", xs, 16, "float16", store_format)
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_of_another_dim_is_refused(tmp_path: Path, store_format: st.StoreFormat) -> None:
    with pytest.raises(ValueError, match=r"row 0: embedding \(2, 16\) is not \(n_tokens, 8\)"):
        write_text(tmp_path / "text", embeddings([2]), 8, "float16", store_format)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_captions", [60, 1000])
def test_text_files_are_hardly_larger_than_their_tokens(
    tmp_path: Path, store_format: st.StoreFormat, dtype: st.StoreDtype, num_captions: int
) -> None:
    lengths = [8 + i % 5 for i in range(num_captions)]
    write_text(tmp_path / "text", embeddings(lengths, dim=64), 64, dtype, store_format)
    token_bytes = 64 * ITEMSIZE[dtype] + (4 if dtype == "int8" else 0)
    limit = 1.02 * sum(lengths) * token_bytes + 64 * num_captions
    assert (tmp_path / "text").stat().st_size <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 1024])
def test_bytes_of_a_text_file_are_known_from_its_token_counts(
    tmp_path: Path, store_format: st.StoreFormat, dtype: st.StoreDtype, dim: int
) -> None:
    num_tokens = [1 + i % 30 for i in range(300)]
    path = tmp_path / "text"
    write_text(path, [np.zeros((n, dim), np.float32) for n in num_tokens], dim, dtype, store_format)
    assert st.embedding_shard_bytes(num_tokens, dim, dtype) == pytest.approx(path.stat().st_size, rel=0.01)


@pytest.mark.parametrize(("size", "rows"), [(4, 0), (4, 1), (64, 100), (256, 7)])
def test_images_roundtrip(tmp_path: Path, store_format: st.StoreFormat, size: int, rows: int) -> None:
    images = np.random.default_rng(1).integers(0, 256, (rows, size, size, 3), dtype=np.uint8)
    path = tmp_path / "images"
    with st.open_image_writer(path, size, store_format) as writer:
        for image in images:
            writer.append(image, "key", "sha256")
    assert [file.name for file in tmp_path.iterdir()] == ["images"]
    assert path.stat().st_size <= images.nbytes * 1.02 + 4096
    group = st.ImagesGroup(f"images-{size}", size, store_format, "raw")
    with open(path, "rb") as remote:
        for source in (str(path), remote):
            file = open_images(source, "images", group)
            assert file.num_rows == rows
            for row in reversed(range(rows)):
                np.testing.assert_array_equal(file.pixels(row), images[row])


def test_local_parquet_is_mapped_not_decoded(tmp_path: Path) -> None:
    with st.open_image_writer(tmp_path / "images", 64, "parquet") as writer:
        for _ in range(100):
            writer.append(np.zeros((64, 64, 3), np.uint8), "key", "sha256")
    write_text(tmp_path / "text", embeddings([3] * 9), 16, "int8", "parquet")
    images: Any = open_images(str(tmp_path / "images"), "images", st.ImagesGroup("images-64", 64, "parquet", "raw"))
    text = ParquetEmbeddings(str(tmp_path / "text"), "text", text_group("int8", "parquet"))
    assert images._values.is_mapped
    values, scales = text._columns[""]
    assert values.is_mapped
    assert scales is not None
    assert scales.is_mapped


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"use_dictionary": True}, {"data_page_size": 64}])
def test_parquet_rewritten_by_others_is_decoded(tmp_path: Path, options: dict) -> None:
    import pyarrow.parquet as pq

    xs = embeddings([3, 1, 0, 5] * 50)
    write_text(tmp_path / "ours", xs, 16, "float16", "parquet")
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 8, **options}
    with pq.ParquetWriter(tmp_path / "theirs", pq.read_schema(tmp_path / "ours"), **options) as writer:
        writer.write_table(pq.read_table(tmp_path / "ours"))
        writer.add_key_value_metadata({"dtype": "float16", "dim": "16"})
    file = ParquetEmbeddings(str(tmp_path / "theirs"), "theirs", text_group("float16", "parquet"))
    assert not file._columns[""][0].is_mapped
    for row, x in enumerate(xs):
        check_restored(x, st.restore(file.stored(row), "float16"), "float16")


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4, 3), np.int16), np.zeros((4, 5, 3), np.uint8), np.zeros((3, 4, 4), np.uint8)]
)
def test_wrong_pixels_are_refused_and_leave_nothing(
    tmp_path: Path, store_format: st.StoreFormat, pixels: np.ndarray
) -> None:
    def write() -> None:
        with st.open_image_writer(tmp_path / "images", 4, store_format) as writer:
            writer.append(np.zeros((4, 4, 3), np.uint8), "key", "sha256")
            writer.append(pixels, "key", "sha256")

    with pytest.raises(ValueError, match=r"row 1: .* not uint8 \(4, 4, 3\)"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_when_a_file_is_closed_is_one_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a second one when the writer is collected, which Python prints as an ignored traceback."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    monkeypatch.setattr(pq.ParquetWriter, "close", full)
    with (
        pytest.raises(OSError, match="No space left"),
        st.open_image_writer(tmp_path / "images", 4, "parquet") as writer,
    ):
        writer.append(np.zeros((4, 4, 3), np.uint8), "key", "sha256")
    del writer
    gc.collect()
    assert not ignored
    assert list(tmp_path.iterdir()) == []


def test_the_same_rows_make_the_same_bytes(tmp_path: Path) -> None:
    def write(folder: Path) -> dict[str, bytes]:
        folder.mkdir()
        st.write_samples(folder / "samples", ROWS)
        for store_format in ("parquet", "hdf5"):
            with st.open_image_writer(folder / f"images-{store_format}", 4, store_format) as writer:
                writer.append(np.full((4, 4, 3), 7, np.uint8), "key", "sha256")
            for dtype in DTYPES:
                xs = embeddings([3, 0, 2])
                write_text(folder / f"{dtype}-{store_format}", xs, 16, dtype, store_format)
        for dtype in DTYPES:
            (folder / f"null-{dtype}").write_bytes(st.dump_null(embeddings([1])[0], dtype))
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first = write(tmp_path / "a")
    time.sleep(1.1)  # HDF5 keeps times in seconds
    assert len(first) == 15
    assert write(tmp_path / "b") == first


def test_another_dtype_or_dim_than_the_manifest_says_is_refused(tmp_path: Path, store_format: st.StoreFormat) -> None:
    path = tmp_path / "text"
    write_text(path, embeddings([2]), 16, "float16", store_format)
    for group in (text_group("bfloat16", store_format), text_group("float16", store_format, dim=8)):
        with pytest.raises(st.StoreError, match=r"holds \(dtype, dim\) \('float16', 16\)"):
            open_embeddings(str(path), "text", group)
