#!/usr/bin/env bash
# Making any optimizer of torch imports its compiler and sympy: 823 modules that an eager training never calls.
#
# In torch 2.13.0 `import torch` leaves torch._dynamo out. The first torch.optim.SGD (or Adam, AdamW) of a process imports
# it, as the wrapper that hides `add_param_group` from the compiler does so when it is called; sympy and mpmath come with
# it. Nothing is compiled, and TORCH_COMPILE_DISABLE=1 and TORCHDYNAMO_DISABLE=1 change nothing. On the machine where
# this was seen it took 1.1 s and 71 MiB, a third of what torch itself has, in each process. Who measures the memory or
# the start of a training should know; what only samples should make no optimizer.
#
# Fails if it is not as seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import sys
import time

import torch
from torch import nn


def resident_mib():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024


def compiler():
    return [name for name in ("torch._dynamo", "sympy", "mpmath") if name in sys.modules]


layer = nn.Linear(4, 4)
layer(torch.ones(2, 4)).sum().backward()
assert compiler() == [], compiler()
modules, memory, began = len(sys.modules), resident_mib(), time.perf_counter()
torch.optim.SGD(layer.parameters(), lr=0.1)
assert compiler() == ["torch._dynamo", "sympy", "mpmath"], compiler()
more = len(sys.modules) - modules
assert more > 700, more
print(f"{more} modules more, {resident_mib() - memory} MiB, {time.perf_counter() - began:.2f} s")
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
TORCH_COMPILE_DISABLE=1 TORCHDYNAMO_DISABLE=1 "$folder/venv/bin/python" "$folder/look.py"
