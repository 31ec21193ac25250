#!/usr/bin/env bash
# AdamW(fused=True) on a CPU updates the wrong numbers where a weight and its gradient lie in memory in other orders.
#
# In torch 2.13.0 the fused kernel of CPUs goes through weight and gradient side by side, by their places in memory. If a
# convolution's weight is channels-last and the gradient that was assigned to it is contiguous, or the other way round,
# each weight gets another one's gradient: no error, no warning, and after 3 steps of lr 0.01 some are off by 0.05. With
# foreach=True, and where both have one order, results agree to 1e-7. Gradients of autograd have the weight's order;
# those that one assigns (averaged, loaded, computed by hand) may not. imagen_core/train/adamw.py puts them in order.
#
# Fails if it is not as seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn

ORDERS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def trained(weight_order, gradient_order, **kind):
    weight = nn.Parameter(torch.arange(288.0).reshape(8, 4, 3, 3).sin().contiguous(memory_format=ORDERS[weight_order]))
    optimizer = torch.optim.AdamW([weight], lr=0.01, **kind)
    for step in range(3):
        gradient = (torch.arange(288.0).reshape(8, 4, 3, 3) * (step + 1)).cos()
        weight.grad = gradient.contiguous(memory_format=ORDERS[gradient_order])
        optimizer.step()
    return weight.detach()


for weight_order in ORDERS:
    for gradient_order in ORDERS:
        arguments = weight_order, gradient_order
        error = float((trained(*arguments, fused=True) - trained(*arguments, foreach=True)).abs().max())
        print(f"weight {weight_order}, gradient {gradient_order}: fused and foreach differ by {error:.2g}")
        assert error < 1e-6 if weight_order == gradient_order else error > 0.04
PYTHON
