"""Inputs that imagen-pytorch and we make alike."""

from typing import Any

import torch
from torch import Tensor

from tests.imagen_core.conversion.minimagen.numbers import numbers

TEXT_DIM = 24
TIMES = (0.2, 0.7)
"""Times of the two images' noise levels."""
NEXT_TIME = 0.5
"""The sampled step goes from 0.7 to this time."""
SIGMAS = (0.3, 4.0)
"""Noise levels of ElucidatedImagen."""
LOW_RES_TIME = 0.4
"""Time of the low-resolution images' noise level."""


def trained(imagen: dict[str, Any]) -> int:
    """The index of the cascade's one UNet that is no placeholder."""
    (index,) = (index for index, unet in enumerate(imagen["unets"]) if not unet.get("is_null"))
    return index


def inputs(imagen: dict[str, Any]) -> dict[str, Tensor]:
    """Two images in [-1, 1] with noise to add, captions of 2 and 4 tokens, low-resolution images of half the side with
    noise of the complete size, and noise of sampling."""
    size = imagen["image_sizes"][trained(imagen)]
    x0 = numbers("x0", (2, 3, size, size)).clamp(-1, 1)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    return {
        "x0": x0,
        "noise": numbers("noise", (2, 3, size, size)),
        "text": numbers("text", (2, 4, TEXT_DIM)) * mask[..., None],
        "mask": mask,
        "low_res": x0[..., ::2, ::2],
        "low_res_noise": numbers("low_res_noise", (2, 3, size, size)),
        "estimate": numbers("estimate", (2, 3, size, size)).clamp(-1, 1),
        "step_noise": numbers("step_noise", (8, 2, 3, size, size)),
    }
