"""Inputs that guided-diffusion, improved-diffusion and we make alike."""

import torch
from torch import Tensor

from tests.imagen_core.conversion.minimagen.numbers import numbers

LABELS = [3, 998]
STEP = 0.6
"""Part of the steps above the one that is trained on, and from which a sampler goes down."""


def inputs(side_px: int, steps: int, channels: int = 3) -> dict[str, Tensor]:
    """Two images of 8 bits, the noise on them, and that of a sampler's step; low-resolution images of a quarter the
    side; labels; and the steps of a training."""
    images = numbers("x0", (2, channels, side_px, side_px)).clamp(-2, 2) / 2
    return {
        "x0": (images * 127.5 + 127.5).round() / 127.5 - 1,
        "noise": numbers("noise", images.shape),
        "step_noise": numbers("step_noise", images.shape),
        "low_res": numbers("low_res", (2, channels, side_px // 4, side_px // 4)).clamp(-1, 1),
        "labels": torch.tensor(LABELS),
        "steps": torch.tensor([0, int(STEP * steps)]),
    }


def sampled(outputs: Tensor) -> Tensor:
    """Every 31st number of (b, c, h, w): of all rows, columns and channels."""
    return outputs.flatten()[::31]
