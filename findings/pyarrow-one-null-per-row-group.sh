#!/usr/bin/env bash
# One NULL in each row group, and pyarrow reads all of a Parquet file for a filter that needs a quarter of it.
#
# `pq.read_table(filters=...)` and `ParquetFileFragment.subset` leave out the row groups that by their statistics have no
# wanted row. In pyarrow 26.0.1 they do so for a column without NULLs only. A row group with a NULL is known to them as
# "least <= a <= most, or a is NULL", and of that they do not see that it rules out `a >= 3500`, although a NULL fulfils
# no comparison; a further `a.is_valid()` in the filter changes nothing. The rows that come back are the same: only the
# bytes differ, which is what a table of scores with gaps costs on an object store. stages/sources/tabular/where.py reads the
# statistics itself.
#
# Counts bytes that are read of the same table without and with one NULL in each of its four row groups; fails if it is
# not as seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 numpy
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

ROWS, GROUPS = 400_000, 4
WANTED = pc.field("score") >= ROWS * 7 // 8


class Counted(io.FileIO):
    """A file that counts the bytes which are read of it."""

    bytes_read = 0

    def read(self, size=-1):
        data = super().read(size)
        self.bytes_read += len(data)
        return data

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.bytes_read += count
        return count


def table(num_nulls):
    """Rising scores, the first `num_nulls` of each row group NULL, and noise that does not compress."""
    mask = np.arange(ROWS) % (ROWS // GROUPS) < num_nulls
    noise = np.random.default_rng(0).integers(0, 2**63, ROWS)
    return pa.table({"score": pa.array(np.arange(ROWS), mask=mask), "noise": noise})


found = {}
for nulls in (0, 1):
    path = Path(sys.argv[1]) / f"{nulls}.parquet"
    pq.write_table(table(nulls), path, row_group_size=ROWS // GROUPS)
    fragment = next(ds.dataset(path).get_fragments())
    filters = {"plain": WANTED, "and valid": WANTED & pc.field("score").is_valid()}
    groups = {name: len(fragment.subset(wanted).row_groups) for name, wanted in filters.items()}
    with Counted(path) as file:
        rows = pq.read_table(file, filters=WANTED, pre_buffer=False).num_rows
        part = file.bytes_read / path.stat().st_size
    found[nulls] = (rows, groups)
    print(f"{nulls} NULL per row group: {rows} rows, row groups kept {groups}, {part:.0%} of the file read")
    assert (part < 0.4) == (nulls == 0), part
assert found == {
    0: (ROWS // 8, {"plain": 1, "and valid": 1}),
    1: (ROWS // 8, {"plain": 4, "and valid": 4}),
}, found
PYTHON
