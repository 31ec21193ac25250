#!/usr/bin/env bash
# Two ways to write one image as a batch are equal in every value, and torch resizes them into different layouts.
#
# `image.permute(2, 0, 1)[None]` and `image[None].permute(0, 3, 1, 2)` of an (h, w, 3) image are the same bytes, and
# `is_contiguous(memory_format=torch.channels_last)` is true of both. Only the stride of the batch dimension, of size 1,
# differs. Yet in torch 2.13.0 the antialiased `interpolate` of uint8 returns planes for the first and interleaved channels for the
# second, so code that stores (h, w, 3) copies the first once more. The pixels are equal. stages/images/resample.py
# adds the batch dimension first.
#
# Fails if it is not as seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

image = torch.arange(96 * 96 * 3).remainder(251).to(torch.uint8).reshape(96, 96, 3)
batches = {"permute, then [None]": image.permute(2, 0, 1)[None], "[None], then permute": image[None].permute(0, 3, 1, 2)}
resized = {}
for name, batch in batches.items():
    assert batch.is_contiguous(memory_format=torch.channels_last)
    resized[name] = F.interpolate(batch, size=(32, 32), mode="bicubic", antialias=True)
    print(f"{name}: strides {batch.stride()} -> {resized[name].stride()}")
planes, interleaved = resized.values()
assert planes.stride() == (3072, 1024, 32, 1)
assert interleaved.stride() == (3072, 1, 96, 3)
assert torch.equal(planes, interleaved)
PYTHON
