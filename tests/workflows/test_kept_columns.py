"""`source.keep_columns` from a table to the store, its readers and its tools."""

import json
import math
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core.store import SampleRow, Store, read_samples, verify_store, write_samples
from stages.browse.report.command import report_command
from stages.store_tools.inspect import inspect_command
from tests.commands import call
from tests.imagen_core.store.handmade_store import rewrite_manifest
from tests.images import plain_png
from tests.runs import precompute

SCORES = [0.5, None, 2.5, 3.5, 4.5, 5.5]
MANY = [2**60 + at for at in range(6)]
SMALL = ["encoders=[]", "images.sizes_px=[8]"]
TAGS = ["a", "b", None, "d", "e", "ß"]


def keep(folder: Path, *overrides: str) -> Path:
    """A run of 6 images in 2 shards."""
    rows = {
        "image": [plain_png((at, 0, 0), 8) for at in range(6)],
        "caption": [f"c{at}" for at in range(6)],
        "score": SCORES,
    }
    pq.write_table(pa.table({**rows, "tag": TAGS, "many": [2**60 + at for at in range(6)]}), folder / "a.parquet")
    given = [
        "source.kind=parquet",
        "encoders=[]",
        f"source.path={folder / 'a.parquet'}",
        "shard_size=4",
        "images.sizes_px=[8]",
    ]
    precompute(folder / "run", *given, *overrides)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that keeps columns; tests must not change it."""
    return keep(tmp_path_factory.mktemp("kept"), "source.keep_columns=[score,tag,many]")


def test_samples_and_batches_have_the_columns(run: Path) -> None:
    store = Store.open(run / "store")
    assert store.columns == {"score": "float", "tag": "text", "many": "int"}
    assert [sample.columns for sample in store] == [
        {"score": score, "tag": tag, "many": 2**60 + at}
        for at, (score, tag) in enumerate(zip(SCORES, TAGS, strict=True))
    ]
    (batch,) = store.loader(batch_size=6, shuffle=False, columns=["score", "tag"])
    assert str(batch["columns"]["score"].dtype) == "torch.float64"
    found = [None if math.isnan(value) else value for value in batch["columns"]["score"].tolist()]
    assert (found, batch["columns"]["tag"]) == (SCORES, TAGS)
    with pytest.raises(ValueError, match=r"column 'size' is not in the store; it has \['many', 'score', 'tag'\]"):
        store.loader(batch_size=1, columns=["size"])
    assert store.sample_columns(["score"])["score"].to_pylist() == SCORES


def test_samples_are_chosen_by_kept_columns_of_every_type(run: Path) -> None:
    pytest.importorskip("sqlglot")
    store = Store.open(run / "store")
    assert [sample.columns["score"] for sample in store.where("score > 1 AND tag <> 'd'")] == [4.5, 5.5]
    assert [sample.columns["score"] for sample in store.where("score IS NULL OR many < 0")] == [None]
    assert len(store.where("width = 8")) == 6


def test_tools_show_the_columns(run: Path) -> None:
    key = Store.open(run / "store")[1].key
    result, lines, _ = inspect_command(str(run))
    assert result["columns"] == {"score": "float", "tag": "text", "many": "int"}
    assert "  kept columns: many (int), score (float), tag (text)" in lines
    result, _, _ = inspect_command(str(run), key=key)
    assert result["found"][0]["columns"] == {"score": None, "tag": "b", "many": 2**60 + 1}  # type: ignore[index]
    report_command(str(run))
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "score: 5.5<br>tag: ß</div>" in page
    assert "score: NULL" in page


def test_verify_finds_a_file_with_other_columns(run: Path, tmp_path: Path) -> None:
    store = shutil.copytree(run / "store", tmp_path / "store")
    assert verify_store(store).ok
    path = store / "samples" / "00000.parquet"
    write_samples(path, read_samples(path), columns={"score": "float", "tag": "text"})
    rewrite_manifest(store)
    (problem,) = verify_store(store).problems
    assert problem.message.startswith("kept columns are {'score': 'float', 'tag': 'text'}, the manifest says {'many'")


def test_removal_and_compaction_erase_the_values_of_removed_samples_only(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    keys = [sample.key for sample in Store.open(run / "store")]
    assert call("remove", str(copy), "--key", keys[0], "--reason", "asked", "--compact").code == 0
    store = Store.open(copy / "store")
    assert [sample.columns["score"] for sample in store] == SCORES[1:]
    (path,) = (copy / "store" / "samples").glob("00000*")
    assert [row.columns["tag"] for row in read_samples(path)] == [None, *TAGS[1:4]]
    assert verify_store(copy / "store").ok


def test_a_value_of_another_type_is_a_counted_drop(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(plain_png())
    rows = [{"file": "a.png", "caption": "c", "score": 1}, {"file": "b.png", "caption": "c", "score": "much"}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["source.kind=folder", f"source.path={folder}", *SMALL, "source.keep_columns={score: float}"]
    summary = precompute(tmp_path / "run", *given)
    assert summary["tally"]["groups"]["samples"]["drops"] == {"unsupported_type": 1}
    assert Store.open(tmp_path / "run" / "store")[0].columns == {"score": 1.0}


def test_a_store_without_kept_columns_has_the_bytes_it_had(tmp_path: Path) -> None:
    row = SampleRow("a", ("b",), (0,), None, "0" * 64, 1, 1, 0)
    write_samples(tmp_path / "a.parquet", [row])
    write_samples(tmp_path / "b.parquet", [row], columns={})
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert read_samples(tmp_path / "a.parquet") == [row]
    assert "columns" not in (pq.ParquetFile(tmp_path / "a.parquet").metadata.metadata or {})
