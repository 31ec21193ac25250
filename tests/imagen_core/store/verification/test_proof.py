"""Each damage in two variants: bytes changed, which sha256 tells; and the manifest rewritten to match."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core import store as st
from imagen_core.store.files.digest import caption_digest, fingerprint_digest
from imagen_core.store.files.hdf5 import write_embeddings_hdf5
from imagen_core.store.files.parquet import write_embeddings_parquet
from imagen_core.store.files.samples import SamplesFile
from tests.imagen_core.store.handmade_store import DIM, FINGERPRINT, Made, rewrite_manifest

Make = Callable[..., Made]
SAMPLES = "samples/00000.parquet"

both = pytest.mark.parametrize("sealed", [False, True], ids=["bytes", "rewritten"])


def only_file(made: Made, group: str) -> Path:
    (path,) = (made.path / group).glob("00000.*")
    return path


def the_problem(made: Made, sealed: bool, message: str, file: Path) -> None:
    """One file is bad: of another size or sha256, or, if the store is sealed again, for what is in it."""
    if sealed:
        rewrite_manifest(made.path)
    report = st.verify_store(made.path)
    assert not report.ok
    assert {problem.file for problem in report.problems} == {file.relative_to(made.path).as_posix()}
    wrong = [problem.message for problem in report.problems]
    assert any((message in text) if sealed else ("the manifest says" in text) for text in wrong), wrong


def rewrite_samples(path: Path, change: Callable[[pa.Table], pa.Table], **facts: str) -> None:
    file = pq.ParquetFile(path)
    table, old = change(file.read()), file.metadata.metadata
    pq.write_table(table.replace_schema_metadata({k.decode(): v for k, v in old.items()} | facts), path)


def text_rows(made: Made) -> tuple[list[str], list[np.ndarray]]:
    """The distinct captions of shard 0 and their embeddings as written."""
    samples = st.read_samples(made.path / SAMPLES)
    pairs = {
        i: (caption, embedding)
        for sample, embeddings in zip(samples, made.text, strict=False)
        for i, caption, embedding in zip(sample.caption_ids, sample.captions, embeddings, strict=True)
    }
    return [pairs[i][0] for i in range(len(pairs))], [pairs[i][1] for i in range(len(pairs))]


def write_text(path: Path, captions: list[str], xs: list[np.ndarray], form: st.StoreFormat, model: str) -> None:
    cast, num_tokens = st.cast_embeddings(xs, DIM, "float16"), [len(x) for x in xs]
    st.write_embedding_shard(
        path, cast, num_tokens, DIM, "float16", form, captions=captions, fingerprint={"model": model}
    )


@both
@pytest.mark.parametrize("group", ["images-4", "text-t5"])
def test_one_flipped_byte_of_a_payload(make: Make, store_format: st.StoreFormat, group: str, sealed: bool) -> None:
    made = make(store_format=store_format, shard_rows=(4,), sizes=(4,))
    path = only_file(made, group)
    data = bytearray(path.read_bytes())
    row = made.images[4][2] if group == "images-4" else made.text[2][1].astype(np.float16)
    data[data.index(row.tobytes())] ^= 0x01
    path.write_bytes(data)
    the_problem(made, sealed, "1 images do not belong" if group == "images-4" else "1 embeddings do not belong", path)


@both
def test_two_swapped_images(make: Make, store_format: st.StoreFormat, sealed: bool) -> None:
    made = make(store_format=store_format, shard_rows=(4,), sizes=(4,))
    path, samples = only_file(made, "images-4"), st.read_samples(made.path / SAMPLES)
    with st.open_image_writer(path, 4, store_format) as writer:
        for row in (0, 2, 1, 3):
            writer.append(made.images[4][row], samples[row].key, samples[row].sha256)
    the_problem(made, sealed, "2 images do not belong to their samples, the first in row 1 ('000-001')", path)


@both
def test_two_swapped_embeddings(make: Make, store_format: st.StoreFormat, sealed: bool) -> None:
    made = make(store_format=store_format, shard_rows=(4,), num_captions=1)
    captions, xs = text_rows(made)
    path = only_file(made, "text-t5")
    write_text(path, captions[::-1], xs[::-1], store_format, "tiny")
    the_problem(
        made, sealed, "2 embeddings do not belong to their captions, the first in row 0 ('caption 0 0 é')", path
    )


@both
def test_an_edited_caption(make: Make, store_format: st.StoreFormat, sealed: bool) -> None:
    made = make(store_format=store_format, shard_rows=(4,), num_captions=1)
    path = made.path / SAMPLES

    def edit(table: pa.Table) -> pa.Table:
        captions = [[c.replace("caption 0 1", "caption O I") for c in row] for row in table["captions"].to_pylist()]
        place = table.schema.get_field_index("captions")
        return table.set_column(place, table.schema.field(place), pa.array(captions, table.schema.field(place).type))

    rewrite_samples(path, edit)
    where = only_file(made, "text-t5") if sealed else path
    the_problem(
        made, sealed, "1 embeddings do not belong to their captions, the first in row 1 ('caption O I é')", where
    )


@both
@pytest.mark.parametrize("forged", [False, True], ids=["labelled", "label forged"])
def test_a_shard_encoded_by_another_model(
    make: Make, store_format: st.StoreFormat, sealed: bool, forged: bool
) -> None:
    made = make(store_format=store_format, shard_rows=(4,), num_captions=1)
    captions, xs = text_rows(made)
    path = only_file(made, "text-t5")
    write_text(path, captions, xs, store_format, "another")
    message = "encoded by another encoder: fingerprint"
    if forged:
        theirs, ours = fingerprint_digest({"model": "another"}), fingerprint_digest(FINGERPRINT)
        stored = [st.cast_embedding(x, "float16") for x in xs]
        rows = [(s, caption_digest(theirs, c, s)) for s, c in zip(stored, captions, strict=True)]
        if store_format == "parquet":
            write_embeddings_parquet(path, rows, DIM, "float16", ours)
        else:
            write_embeddings_hdf5(path, rows, [len(x) for x in xs], DIM, "float16", ours)
        message = "2 embeddings do not belong to their captions"
    the_problem(made, sealed, message, path)


def test_a_shard_of_another_place_or_run(make: Make, store_format: st.StoreFormat) -> None:
    made = make(store_format=store_format, shard_rows=(4, 4), sizes=(4,))
    for group in ("images-4", "text-t5"):
        (other,) = (made.path / group).glob("00001.*")
        shutil.copy(only_file(made, group), other)
    rewrite_manifest(made.path)
    messages = {problem.file.split("/")[0]: problem.message for problem in st.verify_store(made.path).problems}
    assert messages["images-4"].startswith("4 images do not belong to their samples, the first in row 0 ('001-000')")
    assert messages["text-t5"].startswith("6 embeddings do not belong to their captions")


def drop(made: Made, *, reasons: dict[str, list[int]], total: int) -> list[st.SampleRow]:
    """Say that shard 0 was made from `total` input rows, of which those were dropped."""
    gone = {row for rows in reasons.values() for row in rows}
    kept = iter(row for row in range(total) if row not in gone)
    rows = [replace(sample, input_row=next(kept)) for sample in st.read_samples(made.path / SAMPLES)]
    st.write_samples(made.path / SAMPLES, rows, num_input_rows=total, dropped=reasons)
    return rows


def test_what_became_of_every_input_row_is_reported(make: Make) -> None:
    made = make(shard_rows=(4, 3), excluded={0: [1], 1: [0, 2]})
    drop(made, reasons={"too_small": [1], "http_404": [0, 5]}, total=7)
    rewrite_manifest(made.path, input_rows=10)
    report = st.verify_store(made.path)
    assert report.ok, report.problems
    assert (report.input_rows, report.num_samples, report.unaccounted) == (10, 4, 0)
    assert (report.dropped, report.excluded) == ({"http_404": 2, "too_small": 1}, {"made_up": 3})


@both
def test_a_dropped_row_without_reason(make: Make, sealed: bool) -> None:
    made = make(shard_rows=(4, 3))
    drop(made, reasons={"too_small": [1], "http_404": [0, 5]}, total=7)
    rewrite_manifest(made.path, input_rows=10)
    rewrite_samples(made.path / SAMPLES, lambda table: table, dropped='{"http_404": [0, 5]}')
    the_problem(made, sealed, "input row 1 is neither a sample nor dropped; 1 such", made.path / SAMPLES)
    assert st.verify_store(made.path).unaccounted == (1 if sealed else 7), "a bad file proves no row"


@both
@pytest.mark.parametrize(
    ("rows", "dropped", "message", "unaccounted"),
    [
        ([0, 1, 1, 3], "{}", "input row 1 is there more than once", 1),
        ([0, 1, 2, 3], '{"bad": [2]}', "input row 2 is there more than once", 0),
        ([0, 1, 2, 4], "{}", "input row 4 is not below 4, the number of input rows", 1),
    ],
)
def test_a_row_twice_or_of_nowhere(
    make: Make, sealed: bool, rows: list[int], dropped: str, message: str, unaccounted: int
) -> None:
    made = make(shard_rows=(4, 3))
    path = made.path / SAMPLES

    def renumber(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index("input_row")
        return table.set_column(place, table.schema.field(place), pa.array(rows, pa.int32()))

    rewrite_samples(path, renumber, dropped=dropped)
    the_problem(made, sealed, message, path)
    if sealed:
        assert st.verify_store(made.path).unaccounted == unaccounted


@pytest.mark.parametrize("dropped", [{}, {"bad": [1, 2]}, {"bad": [3]}])
def test_the_writer_refuses_rows_it_cannot_account_for(make: Make, dropped: dict[str, list[int]]) -> None:
    made = make(shard_rows=(2,))
    rows = st.read_samples(made.path / SAMPLES)
    with pytest.raises(ValueError, match="each must be one sample, or dropped for one reason"):
        st.write_samples(made.path / SAMPLES, rows, num_input_rows=3, dropped=dropped)


def test_a_missing_shard_leaves_its_rows_unaccounted(make: Make) -> None:
    made = make(shard_rows=(4, 3))
    rewrite_manifest(made.path, lambda shards: shards.pop())
    report = st.verify_store(made.path)
    assert (report.input_rows, report.unaccounted) == (7, 3)
    assert [p.message[:38] for p in report.problems] == ["7 input rows, but the shards have 4: s"]


def retried(made: Made, retry_of: list[list[int]]) -> st.VerifyReport:
    """Shard 1 tries rows of shard 0 again."""
    drop(made, reasons={"http_503": [1, 3], "http_404": [0]}, total=7)

    def change(shards: list[dict[str, Any]]) -> None:
        shards[1]["retry_of"] = retry_of

    rewrite_manifest(made.path, change, input_rows=7)
    return st.verify_store(made.path)


def test_rows_tried_again_count_once(make: Make) -> None:
    report = retried(make(shard_rows=(4, 2)), [[0, 1], [0, 3]])
    assert report.ok, report.problems
    assert (report.input_rows, report.num_samples, report.dropped, report.unaccounted) == (7, 6, {"http_404": 1}, 0)


@pytest.mark.parametrize(
    ("retry_of", "message"),
    [
        ([[0, 1], [0, 2]], "input row 2 is tried again in a later shard, but not dropped here"),
        ([[0, 1], [0, 1]], "input row 1 is tried again in two later shards"),
        ([[0, 1]], "2 input rows, the manifest names 1 that were tried again"),
        ([[0, 1], [9, 0]], "rows of shard 9 were tried again, but there is no such shard"),
    ],
)
def test_rows_tried_again_must_have_been_dropped_once(make: Make, retry_of: list[list[int]], message: str) -> None:
    report = retried(make(shard_rows=(4, 2)), retry_of)
    assert any(problem.message.startswith(message) for problem in report.problems), report.problems


def test_a_row_left_for_a_later_shard_must_be_in_one(make: Make) -> None:
    made = make(shard_rows=(4,))
    drop(made, reasons={st.RETRIED: [2]}, total=5)
    rewrite_manifest(made.path, input_rows=5)
    report = st.verify_store(made.path)
    assert report.unaccounted == 1
    assert report.problems[0].message == "input row 2 is dropped as tried again, but in no later shard; 1 such"


def test_a_store_of_schema_1_is_read_and_its_checksums_verified(make: Make) -> None:
    made = make(shard_rows=(4, 3))
    for path in made.path.glob("*/*.parquet"):
        file = pq.ParquetFile(path)
        kept = {k.decode(): v for k, v in file.metadata.metadata.items() if k in (b"dtype", b"dim", b"size_px")}
        table = file.read().drop_columns([n for n in ("digest", "input_row") if n in file.schema_arrow.names])
        with pq.ParquetWriter(path, table.schema.remove_metadata(), use_dictionary=False, compression="none") as out:
            out.write_table(table)
            out.add_key_value_metadata(kept)

    def old(shards: list[dict[str, Any]]) -> None:
        for shard in shards:
            shard["excluded"] = [0]

    rewrite_manifest(made.path, old, schema_version=1)
    store = st.Store.open(made.path)
    assert [sample.captions for sample in store] == [made.captions[i] for i in (1, 2, 3, 5, 6)]
    np.testing.assert_array_equal(store[0].images[8], made.images[8][1])
    np.testing.assert_array_equal(store[4].text["t5"][1], made.text[6][1].astype(np.float16))
    assert SamplesFile(str(made.path / SAMPLES), "samples").row(0).input_row == -1
    report = st.verify_store(made.path)
    assert report.ok, report.problems
    assert (report.input_rows, report.unaccounted, report.excluded) == (None, None, {"unrecorded": 2})
    assert [warning.file for warning in report.warnings] == ["manifest.json"]
    assert "schema 1 proves neither" in report.warnings[0].message
