#!/usr/bin/env bash
# The first `pa.array` of a process imports pandas, whatever it is given.
#
# `import pyarrow` does not load pandas, and an array of plain Python integers has nothing to do with it. Yet in pyarrow
# 26.0.1 the first call of `pa.array` or `pa.scalar` loads an installed pandas (2.3.3), some 390 modules, to find out whether
# the value is one of pandas' objects; an array made from buffers does not. A driver pays that in time and memory at its
# start, and so does every worker process.
# stages/sources/records/row_text.py makes its arrays from buffers instead.
#
# Fails if it is not as seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 pandas==2.3.3 numpy==2.4.6
cat > "$folder/look.py" <<'PYTHON'
import sys

import pyarrow as pa
import pyarrow.compute

number = len(sys.modules)
assert "pandas" not in sys.modules
buffer = pa.py_buffer(b"\x01\x00\x00\x00\x02\x00\x00\x00")
pa.Array.from_buffers(pa.int32(), 2, [None, buffer])
assert "pandas" not in sys.modules, "an array of buffers loads it too"
print("from buffers: pandas is not loaded")
getattr(pa, sys.argv[1])(*([[1, 2]] if sys.argv[1] == "array" else [1]))
print(f"pa.{sys.argv[1]}: pandas is loaded: {'pandas' in sys.modules}, {len(sys.modules) - number} modules more")
assert "pandas" in sys.modules
assert len(sys.modules) - number > 100
PYTHON
for made in array scalar; do "$folder/venv/bin/python" "$folder/look.py" "$made"; done
