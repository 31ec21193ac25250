#!/usr/bin/env bash
# A byte of a .pt file that flipped on the disk loads as another number, without a word.
#
# `torch.save` writes a zip file, and a zip file has a CRC of every member. `torch.load` of torch 2.13.0 does not compare
# them, with `mmap`, `weights_only` or neither; Python's own `zipfile` finds the damage at once. Caches of embeddings in this
# format (one file per caption) thus give training other numbers than were written, for good. Our reader of such
# caches calls `testzip()` first and drops the sample as damaged.
#
# Fails if it is not as seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import struct
import zipfile
from pathlib import Path

import torch

path = Path("embedding.pt")
torch.save({"prompt_embeds": torch.ones(4)}, path)
data = bytearray(path.read_bytes())
data[data.index(struct.pack("<f", 1.0)) + 2] ^= 0x40  # one bit of the first number
path.write_bytes(data)

for options in ({}, {"mmap": True}, {"weights_only": True}):
    values = torch.load(path, **options)["prompt_embeds"].tolist()
    print("torch.load", options, values)
    assert values == [1.5, 1.0, 1.0, 1.0], values
damaged = zipfile.ZipFile(path).testzip()
print("zipfile.testzip:", damaged)
assert damaged == "embedding/data/0", damaged
PYTHON
