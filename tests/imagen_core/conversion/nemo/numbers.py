"""Inputs that NeMo and we make alike."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.imagen_core.conversion.minimagen.numbers import numbers
from tests.imagen_core.conversion.minimagen.numbers import weights as own_weights

SIGMAS = (0.3, 4.0)
"""Noise levels of EDM."""
TIMES = (0.2, 0.7)
"""Times of DDPM."""
LENGTHS = (2, 5)
"""Tokens of the captions."""
LOW_RES_LEVEL = 0.5
"""Noise level of the low-resolution images."""


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state dict; a Regular UNet has its first convolution under two names."""
    state = own_weights(shapes)
    twice = {name: name.replace("input_blocks.0.0", "init_conv.0") for name in state if "input_blocks.0.0" in name}
    return state | {other: state[name] for name, other in twice.items()}


def inputs(model: dict[str, Any]) -> dict[str, Tensor]:
    """Two images with noise to add, captions padded to token_length, and low-resolution images with noise."""
    size, conditioning = model["unet"]["image_size"], model["conditioning"]
    positions = torch.arange(conditioning["token_length"])
    mask = torch.stack([positions < length for length in LENGTHS])
    text = numbers("text", (2, conditioning["token_length"], conditioning["embed_dim"]))
    return {
        "x0": numbers("x0", (2, 3, size, size)).clamp(-1, 1),
        "noise": numbers("noise", (2, 3, size, size)),
        "text": text * mask[..., None],
        "mask": mask,
        "low_res": numbers("low_res", (2, 3, size // 4, size // 4)).clamp(-1, 1),
        "low_res_noise": numbers("low_res_noise", (2, 3, size, size)),
    }
