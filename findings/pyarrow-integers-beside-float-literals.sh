#!/usr/bin/env bash
# A filter on a column of integers fails in pyarrow from 16,777,217 on, if the number it is compared with has a point.
#
# `table.filter(pc.field("id") < pc.scalar(0.5))` compares int64 with a double. pyarrow 26.0.1 first makes the literal a
# float32 where that loses nothing (0.5, 0.0, 2.0 ** 30), and then casts the whole column to float32, checked: an id
# beyond 2 ** 24 raises ArrowInvalid, although the comparison has a plain answer. With a literal that
# needs a double (0.1) the same column works up to 2 ** 53, and the function `pc.less` on the same values does not narrow. So
# whether a filter on a table of ids works depends on the digits of a constant. imagen_core/conditions.py casts integer
# columns to double itself.
#
# Filters ids on both sides of the two limits by four literals; fails if what raises is not what raised on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import pyarrow as pa
import pyarrow.compute as pc

LITERALS = (0.5, 2.0**30, 0.1, 1e300)
IDS = {"2^24": 2**24, "2^24 + 1": 2**24 + 1, "2^53": 2**53, "2^53 + 1": 2**53 + 1}


def works(call):
    try:
        call()
    except pa.ArrowInvalid:
        return "raises"
    return "works"


found = {}
for name, value in IDS.items():
    column = pa.array([value, -value], pa.int64())
    table = pa.table({"id": column})
    by_filter = [works(lambda: table.filter(pc.field("id") < pc.scalar(literal))) for literal in LITERALS]
    by_function = [works(lambda: pc.less(column, pa.scalar(literal))) for literal in LITERALS]
    found[name] = (by_filter, by_function)
    print(f"{name:>8}: filter {by_filter}, function {by_function}")

W, R = "works", "raises"
assert found == {
    "2^24": ([W, W, W, W], [W, W, W, W]),
    "2^24 + 1": ([R, R, W, W], [W, W, W, W]),
    "2^53": ([R, R, W, W], [W, W, W, W]),
    "2^53 + 1": ([R, R, R, R], [R, R, R, R]),
}, found
PYTHON
