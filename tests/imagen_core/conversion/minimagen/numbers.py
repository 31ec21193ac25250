"""Weights and inputs that MinImagen and we make alike."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def numbers(name: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers that depend on the name alone."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    return torch.from_numpy(values.astype(np.float32))


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state dict; MinImagen's buffers `beta` are zero, as always."""
    return {
        name: torch.zeros(*shape) if name.endswith(".beta") else 0.2 * numbers(name, shape)
        for name, shape in shapes.items()
    }


def inputs(text_dim: int) -> dict[str, Tensor]:
    """Two images of 8 px at steps 3 and 17, captions of 2 and 4 tokens, low-resolution images at step 5."""
    return {
        "x": numbers("x", (2, 3, 8, 8)),
        "time": torch.tensor([3, 17]),
        "text": numbers("text", (2, 4, text_dim)),
        "mask": torch.tensor([[True, True, False, False], [True] * 4]),
        "low_res": numbers("low_res", (2, 3, 8, 8)),
        "low_res_time": torch.tensor([5, 5]),
    }


def sampled(outputs: Tensor) -> Tensor:
    """Every fifth number of (b, c, h, w): of all rows, columns and channels."""
    return outputs.flatten()[::5]
