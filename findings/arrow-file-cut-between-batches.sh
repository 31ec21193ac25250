#!/usr/bin/env bash
# A dataset on disk whose Arrow file lost its last batches is a smaller dataset to `datasets`, without a word.
#
# The Arrow streaming format ends with a mark of eight bytes that readers need not insist on. `load_from_disk` of datasets
# 5.2.0 (pyarrow 26.0.1) maps the file and reads batches for as long as there are any, so a file that was copied up to the
# end of a batch gives fewer rows, although dataset_info.json states how many there are. A file that is cut inside a
# batch is an error. `source.kind=huggingface` looks for the mark (stages/sources/huggingface.py).
#
# Saves 3,000 rows, keeps the first batch of the file, and prints what is loaded; fails if it is not what was seen on
# 2026-11-29: 1,000 rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" - "$folder/data" <<'PYTHON'
import json
import sys
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, load_from_disk

folder = Path(sys.argv[1])
Dataset.from_dict({"text": ["a"] * 3000}).save_to_disk(folder)
(file,) = folder.glob("*.arrow")
data = file.read_bytes()
stream = pa.BufferReader(data)
pa.ipc.open_stream(stream).read_next_batch()
file.write_bytes(data[: stream.tell()])
stated = json.loads((folder / "dataset_info.json").read_text()).get("splits") or "no number of rows"
print(f"end mark of the whole file: {data[-8:].hex()}; of the cut one: {file.read_bytes()[-8:].hex()}")
print(f"dataset_info.json states {stated}; load_from_disk gives {len(load_from_disk(folder)):,} rows of 3,000")
if len(load_from_disk(folder)) != 1000:
    sys.exit("not what was seen on 2026-11-29")
PYTHON
