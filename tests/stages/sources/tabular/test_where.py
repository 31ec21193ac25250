"""`source.where`: rows that an SQL condition leaves out are in no shard, and are counted as filtered."""

import csv
import json
import math
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("sqlglot")

from pipeline.errors import ConfigError, MachineError
from stages.sources import tables
from stages.sources.parquet import ParquetConfig
from stages.sources.tabular.where import RowFilter
from stages.sources.urls import UrlsConfig

BATCH = pa.RecordBatch.from_pydict(
    {
        "a": [1.0, 2.0, None, math.nan, 5.0],
        "w": [10, 20, 30, 40, 50],
        "t": ["x", "Y", "5", None, " 7 "],
        "f": [True, False, None, True, True],
    }
)


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("a < 3", [0, 1]),
        ("NOT a < 3", [4]),
        ("a >= 2 AND w >= 20", [1, 4]),
        ("a IS NULL", [2, 3]),
        ("a IS NOT NULL", [0, 1, 4]),
        ("t IN ('x', 'Y')", [0, 1]),
        ("t NOT IN ('x')", [1, 2, 4]),
        ("t LIKE 'x%'", [0]),
        ("t ILIKE 'y'", [1]),
        ("t NOT LIKE 'x'", [1, 2, 4]),
        ("t > 4", [2, 4]),
        ("w BETWEEN 20 AND 40", [1, 2, 3]),
        ("f", [0, 3, 4]),
        ("NOT f", [1]),
        ("-a < -1", [1, 4]),
        ("w * 2 > 50 AND (a + 1) / 2 < 9", [4]),
        ("w > a", [0, 1, 4]),
        ("t = 'x' OR a = 5", [0, 4]),
        ("a <> 1 OR a = 1", [0, 1, 4]),
    ],
)
def test_rows_are_kept_where_the_condition_is_true_and_not_where_unknown(condition: str, kept: list[int]) -> None:
    assert RowFilter(condition).places(BATCH).tolist() == kept
    records = [{name: value for name, value in row.items() if value is not None} for row in BATCH.to_pylist()]
    assert RowFilter(condition).places(records).tolist() == kept


@pytest.mark.parametrize(
    "condition",
    [
        "a <",
        "",
        "a > 1; a < 2",
        "read_csv('x') > 1",
        "a > (SELECT 1)",
        "a IN (SELECT 1)",
        "EXISTS (SELECT 1)",
        "1) FROM t WHERE (1 = 1",
        "a > 1 LIMIT 3",
        "a > 1 GROUP BY a",
        "a > 1 UNION SELECT 1",
        "a.b > 1",
        "a::int > 1",
        "CASE WHEN a > 1 THEN TRUE END",
        "t LIKE 'a' ESCAPE 'b'",
        "a",
        "a + 1",
        "missing > 1",
        "a = 'x'",
    ],
)
def test_what_is_no_condition_on_the_columns_is_refused(condition: str) -> None:
    with pytest.raises(ConfigError, match=r"^source.where: "):
        RowFilter(condition).check({"a": pa.float64(), "t": pa.string()}, "list.parquet")


def test_a_missing_package_is_named() -> None:
    with (
        mock.patch.dict("sys.modules", {"sqlglot": None}),
        pytest.raises(MachineError, match=r"pip install 'sqlglot>=30'"),
    ):
        RowFilter("a > 1")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    return str(path)


ROWS = [{"url": f"u{i}", "caption": "c", "score": i / 10 if i % 7 else None} for i in range(60)]
KEPT = [i for i in range(60) if i % 7 and i / 10 >= 2.5]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_kept_rows_keep_their_keys_in_every_format_and_in_shards_of_workers(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"l.{suffix}", ROWS)
    source = UrlsConfig(path=path, where="score >= 2.5").build()
    source.check()
    shards = list(source.shards(8))
    rows = [row for shard in shards for row in pickle.loads(pickle.dumps(shard)).rows]
    assert [row[:2] for row in rows] == [[f"{i:09d}", f"u{i}"] for i in KEPT]
    assert [shard.num_rows for shard in shards] == [8, 8, 8, len(KEPT) - 24]
    assert source.filtered == len(ROWS) - len(KEPT)


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("x <> 'a'", ["b", "n\no"]),
        ("x LIKE 'n%'", ["n\no"]),
        ("x is not null", ["a", 5, 5.5, True, "b", 2**70, "n\no", [1]]),
        ("x > 5", [5.5, 2**70]),
        ("x = y", [5, "b"]),
        ("x = y and y > 1", [5]),
        ("x = y and y <> 'a'", ["b"]),
        ("x = y and not x = 'a' and y is not null", ["b"]),
    ],
)
def test_cells_of_json_of_other_types_are_read_alike_by_columns_one_by_one_and_from_any_row(
    condition: str, kept: list[Any], tmp_path: Path
) -> None:
    values = ["a", 5, 5.5, None, True, "b", 2**70, "n\no", [1]]
    others = {"5": 5.0, "b": "b"}
    where = RowFilter(condition)
    rows = [{"x": value, "y": others.get(str(value))} for value in values]
    assert [values[place] for place in where.places(rows)] == kept
    alone = [where.places([row]).tolist() for row in rows]
    assert [value for value, found in zip(values, alone, strict=True) if found] == kept
    for value, row in zip(values, rows, strict=True):  # a table of equal lines is one of columns
        (chunk,) = tables.read_chunks(write(tmp_path / "l.jsonl", [row] * 3), ["x", "y"])
        assert where.places(chunk).tolist() == ([0, 1, 2] if value in kept else [])


def test_images_of_parquet_are_filtered_too(tmp_path: Path) -> None:
    path = write(tmp_path / "l.parquet", [{**row, "image": b"i"} for row in ROWS])
    for key_column in (None, "url"):
        source = ParquetConfig(path=path, where="score >= 2.5", key_column=key_column).build()
        source.check()
        rows = [row for shard in source.shards(8) for row in shard.rows]
        assert [row[2] for row in rows] == KEPT
        assert [row[0] for row in rows] == [f"u{i}" if key_column else f"l/{i:07d}" for i in KEPT]
        assert source.filtered == len(ROWS) - len(KEPT)


def test_row_groups_without_a_kept_row_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "l.parquet", ROWS)
    chunks = list(tables.read_chunks(path, ["url", "score"], 0, RowFilter("score >= 2.5")))
    assert [(type(chunk) is range, len(chunk)) for chunk in chunks] == [(True, 20), *[(False, 10)] * 4]
    behind = list(tables.read_chunks(path, ["url", "score"], 25, RowFilter("score >= 2.5")))
    assert [len(chunk) for chunk in behind] == [5, 10, 10, 10]


def test_of_row_groups_whose_statistics_tell_nothing_only_the_columns_of_the_condition_are_read(
    tmp_path: Path,
) -> None:
    rows = [{"url": f"u{i}", "odd": i % 2 if i != 33 else 0.5, "text": "x" if i == 33 else "y"} for i in range(60)]
    path = write(tmp_path / "l.parquet", rows)
    for condition in ("odd > 0.1 AND odd < 0.9", "text = 'x'"):
        honest = pq.ParquetFile.iter_batches
        with mock.patch.object(pq.ParquetFile, "iter_batches", autospec=True, side_effect=honest) as reading:
            chunks = list(tables.read_chunks(path, ["url", "odd", "text"], 0, RowFilter(condition)))
        assert [len(chunk) for chunk in chunks if not isinstance(chunk, range)] == [10]
        read = [(call.kwargs["row_groups"], "url" in call.kwargs["columns"]) for call in reading.call_args_list]
        assert read == [*(([group], False) for group in range(4)), ([3], True), ([4], False), ([5], False)]


@pytest.mark.parametrize(
    ("condition", "groups"),
    [
        ("score >= 2.5", {2, 3, 4, 5}),
        ("2.5 > score", {0, 1, 2}),
        ("score < 1 and url <> 'x'", {0}),
        ("(score between 1.5 and 2.1)", {1, 2}),
        ("score = 3.5", {3}),
        ("score > -1", {0, 1, 2, 3, 4, 5}),
        ("score > 100", set()),
        ("not score > 2.5", {0, 1, 2, 3, 4, 5}),
        ("score > 100 or url = 'u1'", {0, 1, 2, 3, 4, 5}),
        ("score + 1 > 100", {0, 1, 2, 3, 4, 5}),
    ],
)
def test_statistics_rule_out_only_what_the_condition_does(condition: str, groups: set[int], tmp_path: Path) -> None:
    with pq.ParquetFile(write(tmp_path / "l.parquet", ROWS)) as table:
        assert RowFilter(condition).may_match(table, range(6)) == groups


def test_an_invalid_line_is_still_a_drop(tmp_path: Path) -> None:
    path = write(tmp_path / "l.jsonl", ROWS)
    Path(path).write_text("{\n" + Path(path).read_text())
    source = UrlsConfig(path=path, where="score > 100").build()
    (shard,) = source.shards(100)
    assert [row.drop and row.drop[0] for row in source.rows_of(shard)] == ["invalid_line"]
    assert source.filtered == len(ROWS)


def test_the_condition_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", ROWS)
    assert UrlsConfig(path=path, where="score > 1").build().fingerprint()["where"] == "score > 1"
    assert "where" not in UrlsConfig(path=path).build().fingerprint()
