"""verify_store: names every bad file, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagen_core import store as st
from imagen_core.store.files.digest import caption_digest, fingerprint_digest
from imagen_core.store.files.hdf5 import write_embeddings_hdf5
from imagen_core.store.files.parquet import write_embeddings_parquet
from tests.imagen_core.store.handmade_store import DIM, FINGERPRINT, Made, rewrite_manifest, write_text

Make = Callable[..., Made]


def files_of(report: st.VerifyReport) -> set[str]:
    return {problem.file for problem in report.problems}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_a_good_store_has_no_problems(make: Make, store_format: st.StoreFormat, dtype: st.StoreDtype) -> None:
    made = make(store_format=store_format, dtype=dtype, excluded={1: [0]})
    names: list[str] = []
    report = st.verify_store(made.path, on_file=lambda name, size: names.append(name))
    assert report.ok
    assert (report.problems, report.warnings) == ([], [])
    on_disk = [path for path in made.path.rglob("*") if path.is_file()]
    assert report.files_checked == len(on_disk) == len(names) == 14
    assert report.bytes_checked == sum(path.stat().st_size for path in on_disk)
    assert report.num_samples == 11


def test_a_flipped_byte_is_found_in_each_kind_of_file(make: Make, store_format: st.StoreFormat) -> None:
    made = make(store_format=store_format, shard_rows=(4, 2))
    for path in sorted(path for path in made.path.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for position in (0, len(data) // 2, len(data) - 1):
            changed = bytearray(data)
            changed[position] ^= 0x10
            path.write_bytes(changed)
            report = st.verify_store(made.path)
            assert not report.ok
            assert files_of(report) == {path.relative_to(made.path).as_posix()}
        path.write_bytes(data)
    assert st.verify_store(made.path).ok


@pytest.mark.parametrize("name", ["samples/00001", "images-8/00001", "text-t5/00001", "text-t5/null"])
def test_a_truncated_or_missing_file_is_named(make: Make, store_format: st.StoreFormat, name: str) -> None:
    made = make(store_format=store_format)
    (path,) = made.path.glob(f"{name}.*")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    (problem,) = st.verify_store(made.path).problems
    assert problem.file == path.relative_to(made.path).as_posix()
    assert problem.message == f"{size - 10} bytes, the manifest says {size}"
    path.unlink()
    (problem,) = st.verify_store(made.path).problems
    assert (problem.file, problem.message) == (path.relative_to(made.path).as_posix(), "missing")


def test_all_bad_files_are_named(make: Make) -> None:
    made = make()
    for name in ("samples/00000.parquet", "images-4/00002.parquet", "text-t5/00001.parquet"):
        (made.path / name).write_bytes(b"")
    assert files_of(st.verify_store(made.path)) == {
        "samples/00000.parquet",
        "images-4/00002.parquet",
        "text-t5/00001.parquet",
    }


def test_files_the_manifest_does_not_know_are_warnings(make: Make) -> None:
    made = make()
    names = {"samples/00009.parquet", "notes.txt", "images-8/.hidden", ".staging/x", "samples/00000.parquet.tmp"}
    for name in names:
        (made.path / name).parent.mkdir(exist_ok=True)
        (made.path / name).write_bytes(b"x")
    report = st.verify_store(made.path)
    assert report.ok
    assert {warning.file for warning in report.warnings} == names


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_a_non_finite_embedding_is_found(make: Make, store_format: st.StoreFormat, dtype: st.StoreDtype) -> None:
    made = make(store_format=store_format, dtype=dtype, shard_rows=(4,), num_captions=1)
    stored = [st.cast_embedding(np.ones((2, DIM), np.float32), dtype) for _ in range(2)]
    if stored[1].scales is not None:
        stored[1].scales[0] = np.inf
    else:
        stored[1].values[1, 3] = 0x7F80 if dtype == "bfloat16" else np.nan
    encoder = fingerprint_digest(FINGERPRINT)
    rows = [(s, caption_digest(encoder, f"caption 0 {i} é", s)) for i, s in enumerate(stored)]
    (path,) = (made.path / "text-t5").glob("00000.*")
    if store_format == "parquet":
        write_embeddings_parquet(path, rows, DIM, dtype, encoder)
    else:
        write_embeddings_hdf5(path, rows, [2, 2], DIM, dtype, encoder)
    rewrite_manifest(made.path, lambda shards: None)
    (problem,) = st.verify_store(made.path).problems
    assert problem.file.startswith("text-t5/00000.")
    assert problem.message == "1 embeddings are not finite, the first in row 1"


def test_row_counts_must_agree(make: Make, store_format: st.StoreFormat) -> None:
    made = make(store_format=store_format, shard_rows=(4,), sizes=(4,))
    (images,) = (made.path / "images-4").glob("*")
    with st.open_image_writer(images, 4, store_format) as writer:
        writer.append(np.zeros((4, 4, 3), np.uint8), "key", "sha256")
    (text,) = (made.path / "text-t5").glob("00000.*")
    write_text(text, [np.ones((1, DIM), np.float32)], DIM, "float16", store_format)

    def one_row(shards: list[dict[str, Any]]) -> None:
        shards[0]["files"]["text-t5"]["rows"] = 1

    rewrite_manifest(made.path, one_row)
    messages = {problem.file.split("/")[0]: problem.message for problem in st.verify_store(made.path).problems}
    assert messages == {
        "images-4": "1 rows, the manifest says 4",
        "text-t5": "1 rows, the samples have 6 distinct captions",
    }


def test_another_size_or_dim_than_the_manifest_says_is_found(make: Make, store_format: st.StoreFormat) -> None:
    made = make(store_format=store_format, shard_rows=(1,), sizes=(4,), num_captions=1)
    (images,) = (made.path / "images-4").glob("*")
    with st.open_image_writer(images, 5, store_format) as writer:
        writer.append(np.zeros((5, 5, 3), np.uint8), "key", "sha256")
    (text,) = (made.path / "text-t5").glob("00000.*")
    write_text(text, [np.ones((1, 7), np.float32)], 7, "float16", store_format)
    rewrite_manifest(made.path, lambda shards: None)
    found = sorted(st.verify_store(made.path).problems, key=lambda problem: problem.file)
    assert "pixels are" in found[0].message
    assert "holds (dtype, dim) ('float16', 7)" in found[1].message


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", ("x",), (0,)), ("a", ("x",), (0,))], "key 'a' occurs twice here"),
        ([("a", ("x",), (0,)), ("b", ("y",), (0,))], "caption id 0 is of another caption too"),
        ([("a", ("x",), (0,)), ("b", ("y",), (2,))], "caption ids are not 0 to 1"),
    ],
)
def test_wrong_samples_are_found(make: Make, rows: list[tuple], message: str) -> None:
    made = make(shard_rows=(2,), num_captions=1)
    samples = [
        st.SampleRow(*row, url=None, sha256="0" * 64, width=1, height=1, input_row=i) for i, row in enumerate(rows)
    ]
    st.write_samples(made.path / "samples" / "00000.parquet", samples)
    rewrite_manifest(made.path, lambda shards: None)
    problems = st.verify_store(made.path).problems
    assert message in [
        problem.message.removeprefix("'b': ") for problem in problems if problem.file.startswith("samples")
    ]


def test_a_key_of_two_shards_is_found(make: Make) -> None:
    made = make(shard_rows=(2, 2, 2), num_captions=1)
    rows = st.read_samples(made.path / "samples" / "00000.parquet")
    st.write_samples(made.path / "samples" / "00002.parquet", rows)
    rewrite_manifest(made.path, lambda shards: None)
    problems = [p for p in st.verify_store(made.path).problems if p.file.startswith("samples")]
    assert [problem.file for problem in problems] == ["samples/00002.parquet"] * 2
    assert problems[0].message == "key '000-000' occurs twice and in samples/00000.parquet"


def test_a_changed_manifest_is_the_one_problem(make: Make) -> None:
    made = make()
    path = made.path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"test", b"tset"))
    (problem,) = st.verify_store(made.path).problems
    assert problem.file == "manifest.json"
    assert "do not match their own sha256" in problem.message


def test_a_folder_without_a_store_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(st.StoreError, match="not a store"):
        st.verify_store(tmp_path)
