#!/usr/bin/env bash
# Two JSON objects on one line, and pyarrow reads two rows where everybody who reads line by line sees none.
#
# A list in JSON lines has one object on a line. Where a writer lost a line end, `json.loads` refuses the line ("Extra data"), and
# `datasets` and pandas with it. `pyarrow.json.read_json` in pyarrow 26.0.1 takes what follows the first object as the next
# row, without an error, so the rows after it have other numbers than their lines: a row number that serves as a key then
# names another image than in a reader that goes by lines. stages/sources/records/regular.py counts the objects by lines and reads a block
# line by line where they are not as many as the rows.
#
# Fails if it is not as seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import io
import json

import pyarrow.json

TEXT = '{"url": "a"}{"url": "b"}\n{"url": "c"}\n'

rows = pyarrow.json.read_json(io.BytesIO(TEXT.encode())).to_pylist()
print("pyarrow:", rows)
assert [row["url"] for row in rows] == ["a", "b", "c"], rows

lines = []
for line in TEXT.splitlines():
    try:
        lines.append(json.loads(line)["url"])
    except json.JSONDecodeError as error:
        lines.append(str(error).partition(":")[0])
print("line by line:", lines)
assert lines == ["Extra data", "c"], lines
PYTHON
