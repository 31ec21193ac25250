"""Columns of Python values are those of `pa.array`, made without pandas."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core.store.files.arrow_column import arrow_column, as_numpy

COLUMNS: list[tuple[pa.DataType, list[Any]]] = [
    (pa.int32(), [3, -(2**31), 2**31 - 1, np.int32(7)]),
    (pa.int64(), [3, None, -(2**63)]),
    (pa.uint64(), [0, 2**64 - 1, np.uint64(2**63)]),
    (pa.float64(), [0.5, None, float("inf"), 2]),
    (pa.bool_(), [True, None, False] * 5),
    (pa.string(), ["", "naïve", None, "\0", "日本語"]),
    (pa.binary(), [b"", b"\0\xff", None, b"abc"]),
    (pa.binary(3), [b"abc", None, b"\0\0\0"]),
    (pa.list_(pa.field("element", pa.string(), nullable=False)), [("a", "b"), [], None, ("",)]),
    (pa.list_(pa.field("element", pa.int32(), nullable=False)), [(1, 2), (), (3,)]),
    (pa.float32(), [0.5, None]),
]


@pytest.mark.parametrize(("kind", "values"), COLUMNS, ids=[str(kind) for kind, _ in COLUMNS])
def test_a_column_is_the_one_of_pyarrow_and_gives_the_same_file(
    kind: pa.DataType, values: list[Any], tmp_path: Path
) -> None:
    for rows in (values, values[:1], [], [value for value in values if value is not None], [None, None]):
        made, expected = arrow_column(rows, kind), pa.array(rows, kind)
        made.validate(full=True)
        assert made.equals(expected)
        assert made.type == kind
        assert made.null_count == expected.null_count
        for name, column in (("made", made), ("expected", expected)):
            pq.write_table(pa.table({"x": column}), tmp_path / name)
        assert (tmp_path / "made").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize(
    ("kind", "value", "error"),
    [
        (pa.int32(), 1.5, TypeError),
        (pa.int32(), "1", TypeError),
        (pa.int32(), 2**31, OverflowError),
        (pa.uint64(), -1, OverflowError),
        (pa.float64(), "1", TypeError),
        (pa.string(), "\udc80", UnicodeEncodeError),
        (pa.string(), 1, AttributeError),
        (pa.binary(3), b"ab", ValueError),
    ],
)
def test_a_value_that_does_not_fit_is_refused(kind: pa.DataType, value: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        arrow_column([value], kind)


def test_numbers_of_a_slice_are_those_of_pyarrow() -> None:
    for kind in (pa.int32(), pa.int64(), pa.uint64()):
        numbers = pa.array(range(10), kind)
        for part in (numbers, numbers[3:7], numbers[:0], pa.array([], kind)):
            found = as_numpy(part)
            assert found.dtype == part.to_numpy().dtype
            assert found.tolist() == part.to_pylist()


@pytest.mark.slow
def test_the_files_of_a_shard_are_written_and_read_without_pandas(tmp_path: Path) -> None:
    code = f"""
import sys
import numpy as np
from imagen_core.store import SampleRow, open_image_writer, read_samples, write_samples
rows = [SampleRow("a", ("one", "two"), (0, 1), None, "0" * 64, 8, 8, 0)]
write_samples({str(tmp_path / "s.parquet")!r}, rows)
assert read_samples({str(tmp_path / "s.parquet")!r}) == rows
with open_image_writer({str(tmp_path / "i.parquet")!r}, 8, "parquet") as writer:
    writer.append(np.zeros((8, 8, 3), np.uint8), "a", "0" * 64)
print("pandas" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "False\n", done.stderr
