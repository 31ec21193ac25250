#!/usr/bin/env bash
# torch's Muon takes sharded matrices without a word, and updates them otherwise than one process would.
#
# torch.optim.Muon of torch 2.13.0 orthogonalises the momentum by products in bfloat16. Of a DTensor whose rows are on two
# processes each sums its part, is rounded, and the parts are added: the same matrix and gradient give an update that
# differs by 2 to 3 % (norm of the difference over that of the update), where AdamW's differs by rounding of float32. So a
# training goes another way on another number of processes. imagen_core/train/parallel/muon.py gathers each matrix.
#
# Fails if it is not as seen on 2026-11-30. Two processes meet in a file; nothing listens on a port but gloo's own, on
# loopback.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/sharded.py" <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

OPTIMIZERS = {"Muon": torch.optim.Muon, "AdamW": torch.optim.AdamW}


def tensors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(256, 64, generator=generator) * 0.05, torch.randn(256, 64, generator=generator)


def step(kind, parameter, gradient):
    parameter.grad = gradient
    OPTIMIZERS[kind]([parameter], lr=0.1, weight_decay=0.0).step()
    return parameter.detach()


def shard(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for kind in OPTIMIZERS:
        weight, gradient = (distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in tensors())
        whole = step(kind, nn.Parameter(weight), gradient).full_tensor()
        if rank == 0:
            torch.save(whole, f"{folder}/{kind}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = sys.argv[1]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    processes.spawn(shard, (folder,), nprocs=2)
    errors = {}
    for kind in OPTIMIZERS:
        weight, gradient = tensors()
        alone = step(kind, nn.Parameter(weight.clone()), gradient) - weight
        errors[kind] = float((torch.load(f"{folder}/{kind}.pt") - weight - alone).norm() / alone.norm())
        print(f"{kind}: the update of two processes differs from that of one by {errors[kind]:.2g}")
    assert 0.01 < errors["Muon"] < 0.05
    assert errors["AdamW"] < 1e-6
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/sharded.py" "$folder" 2> "$folder/warnings"
