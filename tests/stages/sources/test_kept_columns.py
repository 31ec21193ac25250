"""`source.keep_columns`: columns of the source that reach the store, typed."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core.store import ColumnType
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.sources.annotations import AnnotationsConfig
from stages.sources.base import Source
from stages.sources.folder import FolderConfig
from stages.sources.parquet import ParquetConfig
from stages.sources.records.cells import BadCell
from stages.sources.records.kept import kept_values
from stages.sources.tars import WebdatasetConfig
from stages.sources.urls import UrlsConfig
from tests.stages.sources.reading import read_originals, tar_bytes

ROWS = [
    {"url": "http://127.0.0.1/0", "caption": "a", "score": 5.5, "name": "x", "safe": True},
    {"url": "http://127.0.0.1/1", "caption": "b", "score": None, "name": None, "safe": None},
    {"url": "http://127.0.0.1/2", "caption": "c", "score": 1.0, "name": "ß", "safe": False},
]
KEPT = ["score", "name", "safe"]
WANTED = [{name: row[name] for name in KEPT} for row in ROWS]


def write(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS, name: str = "list") -> Path:
    path = folder / f"{name}.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerow(rows[0])
            writer.writerows(["" if value is None else value for value in row.values()] for row in rows)
    return path


def kept_in_shards(source: Source) -> list[Any]:
    source.check()
    return [row.annotations["columns"] for shard in source.shards(2) for row in source.rows_of(shard)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tsv"])
def test_lists_of_urls_keep_typed_columns(kind: str, tmp_path: Path) -> None:
    source = UrlsConfig(path=str(write(tmp_path, kind)), keep_columns=KEPT).build()  # type: ignore[arg-type]
    found = kept_in_shards(source)
    if kind in ("csv", "tsv"):  # text: an empty cell of text is a text, and `True` is one too
        assert source.column_types == {"score": "float", "name": "text", "safe": "text"}
        assert [each["score"] for each in found] == [5.5, None, 1.0]
        assert [each["name"] for each in found] == ["x", "", "ß"]
    else:
        assert source.column_types == {"score": "float", "name": "text", "safe": "bool"}
        assert found == WANTED


def test_columns_and_records_give_the_same_shards(tmp_path: Path) -> None:
    rows = [{**row, "number": 2**60, "caption": '\\"\n' * (at == 2) + "c"} for at, row in enumerate(ROWS)]
    source = UrlsConfig(
        path=str(write(tmp_path, "parquet", rows)),
        keep_columns=[*KEPT, "number"],  # type: ignore[arg-type]
    ).build()
    source.check()
    (shard,) = source.shards(10)
    assert shard.digest == Shard(0, shard.rows, 3, {}).digest
    assert [row[3]["columns"] for row in shard.rows] == [{**wanted, "number": 2**60} for wanted in WANTED]


def test_images_in_parquet_keep_columns(tmp_path: Path) -> None:
    rows = [{**row, "image": b"i", "many": at} for at, row in enumerate(ROWS)]
    path = write(tmp_path, "parquet", rows)
    source = ParquetConfig(path=str(path), keep_columns=[*KEPT, "many"]).build()  # type: ignore[arg-type]
    source.check()
    found = [original.annotations["columns"] for original in read_originals(source)]
    assert found == [{**wanted, "many": at} for at, wanted in enumerate(WANTED)]
    assert source.column_types["many"] == "int"


def test_json_in_tars_is_kept(tmp_path: Path) -> None:
    members = [(f"{at}.json", json.dumps(row).encode()) for at, row in enumerate(ROWS)]
    members += [(f"{at}.jpg", b"i") for at in range(3)]
    (tmp_path / "a.tar").write_bytes(tar_bytes(sorted(members)))
    config = WebdatasetConfig(path=str(tmp_path), caption_column="caption", keep_columns=KEPT)  # type: ignore[arg-type]
    source = config.build()
    source.check()
    assert [original.annotations["columns"] for original in read_originals(source)] == WANTED
    assert source.column_types == {"score": "float", "name": "text", "safe": "bool"}
    assert source.fingerprint()["keep_columns"] == source.column_types


@pytest.mark.parametrize("table", ["captions", "metadata"])
def test_tables_of_folders_are_kept(table: str, tmp_path: Path) -> None:
    rows = [{"file": f"{at}.png", **row} for at, row in enumerate(ROWS)]
    write(tmp_path, "jsonl", rows, table)
    source = FolderConfig(path=str(tmp_path), keep_columns=KEPT).build()  # type: ignore[arg-type]
    assert kept_in_shards(source) == WANTED


def test_datasets_are_kept(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from stages.sources.huggingface import HuggingfaceConfig

    rows = [{**row, "image": b"i"} for row in ROWS]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
    config = HuggingfaceConfig(path=str(tmp_path / "d"), caption_column="caption", keep_columns=KEPT)  # type: ignore[arg-type]
    source = config.build()
    source.check()
    assert [original.annotations["columns"] for original in read_originals(source)] == WANTED


@pytest.mark.parametrize(
    ("kind", "value", "kept"),
    [
        ("float", "5.5", 5.5),
        ("float", 3, 3.0),
        ("float", math.nan, None),
        ("float", " ", None),
        ("int", 3.0, 3),
        ("int", "-7", -7),
        ("int", "9007199254740993", 9007199254740993),
        ("bool", "TRUE", True),
        ("text", "", ""),
        ("text", b"\xc3\x9f", "ß"),
    ],
)
def test_a_value_is_read_as_its_column_is_typed(kind: ColumnType, value: object, kept: object) -> None:
    found = kept_values({"x": value}, {"x": kind})["x"]
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("float", "much"),
        ("float", True),
        ("float", math.inf),
        ("float", [1.0]),
        ("int", 1.5),
        ("int", 2**63),
        ("bool", 1),
        ("text", 5),
        ("text", b"\xff"),
    ],
)
def test_a_value_of_another_type_is_the_drop_unsupported_type(kind: ColumnType, value: object) -> None:
    with pytest.raises(BadCell) as caught:
        kept_values({"x": value}, {"x": kind})
    assert caught.value.reason == "unsupported_type"
    assert "'x' holds" in caught.value.detail


def test_a_row_with_a_value_of_another_type_is_dropped_and_the_others_stay(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "score": score} for score in (1.5, "much", 2)]
    source = UrlsConfig(path=str(write(tmp_path, "jsonl", rows)), keep_columns={"score": "float"}).build()
    source.check()
    found = [row for shard in source.shards(10) for row in source.rows_of(shard)]
    assert [row.annotations.get("columns") for row in found] == [{"score": 1.5}, None, {"score": 2.0}]
    assert found[1].drop == ("unsupported_type", "'score' holds 'much', not a number")


def test_a_column_that_one_of_many_files_lacks_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "parquet", ROWS, "0")
    write(tmp_path, "parquet", [{"url": "http://127.0.0.1/", "caption": "c"}], "1")
    kept: Any = ["score"]
    urls = UrlsConfig(path=str(tmp_path), keep_columns=kept)
    for config in (urls, ParquetConfig(path=str(tmp_path), image_column=None, keep_columns=kept)):
        with pytest.raises(ConfigError, match=r"source.keep_columns: .*1.parquet has no column 'score'"):
            config.build().check()


def test_types_that_differ_between_files_are_refused_unless_both_are_numbers(tmp_path: Path) -> None:
    write(tmp_path, "parquet", [{**ROWS[0], "score": 5}], "0")
    write(tmp_path, "parquet", [{**ROWS[0], "score": 5.5}], "1")
    source = UrlsConfig(path=str(tmp_path), keep_columns=["score"]).build()  # type: ignore[arg-type]
    assert kept_in_shards(source) == [{"score": 5.0}, {"score": 5.5}]
    write(tmp_path, "parquet", [{**ROWS[0], "score": "high"}], "2")
    with pytest.raises(ConfigError, match=r"'score' is numbers in .*0.parquet and text in .*2.parquet"):
        source.check()


def test_types_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    import datetime

    write(tmp_path, "parquet", [{**ROWS[0], "day": datetime.date(2026, 1, 2)}])
    source = UrlsConfig(path=str(tmp_path), keep_columns=["day"]).build()  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'day' is of type date32.*, not numbers, booleans or text"):
        source.check()


def test_a_column_without_a_value_in_the_first_rows_needs_a_type(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [{**ROWS[0], "score": None}])
    with pytest.raises(ConfigError, match=r"no value of 'score' is in the first rows.*give the type"):
        UrlsConfig(path=str(path), keep_columns=["score"]).build().check()  # type: ignore[arg-type]
    source = UrlsConfig(path=str(path), keep_columns={"score": "int"}).build()
    assert kept_in_shards(source) == [{"score": None}]


@pytest.mark.parametrize("name", ["key", "Width", "caption_ids", "digest", "label", "columns"])
def test_a_name_that_the_store_has_itself_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"keep_columns.*'{name}' is a column that the store has by itself"):
        load_config(AnnotationsConfig, {"keep_columns": [name]})


def test_a_folder_without_a_table_and_a_txt_list_have_no_columns_to_keep(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"i")
    with pytest.raises(ConfigError, match=r"source.keep_columns: 'score' is a column of a captions table"):
        FolderConfig(path=str(tmp_path), keep_columns=["score"]).build().check()  # type: ignore[arg-type]
    (tmp_path / "l.txt").write_text("http://127.0.0.1/\n")
    with pytest.raises(ConfigError, match=r"source.keep_columns: .*l.txt has no column 'score'"):
        UrlsConfig(path=str(tmp_path / "l.txt"), keep_columns={"score": "int"}).build().check()
