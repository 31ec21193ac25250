"""Pages of embeddings that pyarrow did not write are read as those that it did write."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.exports import parquet_file
from stages.exports.parquet_file import Embeddings, ParquetFile
from stages.exports.thrift import read_struct, struct_bytes

OPTIONS: dict[str, Any] = {"compression": "NONE", "use_dictionary": ["key"], "write_statistics": ["key"]}
COUNTS = [[3], [], [1, 4], [0], [2, 0, 5], [0, 2], [7] * 20]
"""Tokens of each caption of each row."""


def embeddings(token_shape: tuple[int, ...], dtype: Any) -> Embeddings:
    rng = np.random.default_rng(0)
    return [[rng.standard_normal((count, *token_shape)).astype(dtype) for count in counts] for counts in COUNTS]


def table(rows: Embeddings, token_shape: tuple[int, ...], dtype: Any) -> pa.Table:
    """Made by pyarrow from Python lists."""
    kind = pa.from_numpy_dtype(dtype)
    for length in reversed(token_shape):
        kind = pa.list_(kind, length)
    lists = [[array.tolist() for array in arrays] for arrays in rows]
    if dtype == np.float16:
        lists = [[_halves(array) for array in arrays] for arrays in rows]
    keys = [f"key {len(arrays)}" for arrays in rows]
    return pa.table({"key": keys, "e": pa.array(lists, pa.list_(pa.list_(kind))), "last": keys})


def _halves(array: np.ndarray) -> list[Any]:
    return [_halves(each) for each in array] if array.ndim > 1 else list(array)


def write(path: Path, tables: list[tuple[pa.Table, Embeddings]], token_shape: tuple[int, ...]) -> None:
    with ParquetFile(path, OPTIONS) as file:
        for rows, arrays in tables:
            empty = pa.array([[]] * len(rows), rows.schema.field("e").type)
            file.write(rows.set_column(1, rows.schema.field("e"), empty), {"e": (token_shape, arrays)})


@pytest.mark.parametrize("page_bytes", [1, 300, 1 << 20])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("token_shape", [(1,), (5,), (300,), (3, 4), (1, 1), (2, 1)])
def test_pyarrow_reads_what_it_would_have_written(
    token_shape: tuple[int, ...], dtype: Any, page_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_file, "_PAGE_BYTES", page_bytes)
    rows = embeddings(token_shape, dtype)
    whole = table(rows, token_shape, dtype)
    parts = [(whole.slice(begin, end - begin), rows[begin:end]) for begin, end in pairwise((0, 1, 2, 3, 7))]
    write(tmp_path / "ours.parquet", parts, token_shape)
    found = pq.ParquetFile(tmp_path / "ours.parquet")
    read = found.read()
    read.validate(full=True)
    assert read.equals(whole)
    with pq.ParquetWriter(tmp_path / "theirs.parquet", whole.schema, **OPTIONS) as writer:
        for part, _ in parts:
            writer.write_table(part)
    expected = pq.ParquetFile(tmp_path / "theirs.parquet")
    assert found.schema.equals(expected.schema)
    assert found.schema_arrow.equals(expected.schema_arrow, check_metadata=True)
    for number in range(len(parts)):
        ours, theirs = found.metadata.row_group(number), expected.metadata.row_group(number)
        assert (ours.num_rows, ours.num_columns) == (theirs.num_rows, theirs.num_columns)
        assert found.read_row_group(number).equals(parts[number][0])
        for column in range(ours.num_columns):
            names = ("num_values", "encodings", "compression", "path_in_schema", "physical_type")
            chunks = (each.column(column).to_dict() for each in (ours, theirs))
            assert len({str([chunk[name] for name in names]) for chunk in chunks}) == 1


def test_another_reader_reads_them(tmp_path: Path) -> None:
    rows = embeddings((5,), np.float32)
    write(tmp_path / "ours.parquet", [(table(rows, (5,), np.float32), rows)] * 2, (5,))
    lists = duckdb.connect().execute(f"select e from '{tmp_path}/ours.parquet'").fetchall()
    expected = [[array.tolist() for array in arrays] for arrays in rows] * 2
    assert [value for (value,) in lists] == expected


def test_a_footer_comes_back_as_it_was(tmp_path: Path) -> None:
    columns = {f"c{number}": [number, None, 1] for number in range(20)}
    nested = {"list": [[1.5], [], None], "text": ["x" * 300, "é", None], "flag": [True, False, None]}
    pq.write_table(pa.table({**columns, **nested}), tmp_path / "x.parquet", row_group_size=2)
    data = (tmp_path / "x.parquet").read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - size : -8]
    assert struct_bytes(read_struct(footer)) == footer
