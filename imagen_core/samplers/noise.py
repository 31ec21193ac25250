"""Random numbers of sampling: one generator an image, so that an image does not depend on its batch."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """Where samplers take their standard normal numbers from."""

    def __len__(self) -> int: ...
    def draw(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor: ...


class SeededNoise:
    """RandomNumbers standard normal numbers; image i's depend on seeds[i], the stream and the draws before, only.

    Numbers are made on the CPU, so a seed means the same image on every device.
    """

    def __init__(self, seeds: Sequence[int], stream: int = 0):
        """`stream` keeps draws for different purposes (the stages of a cascade) independent."""
        self._generators = [torch.Generator().manual_seed(_mix(seed, stream)) for seed in seeds]

    def __len__(self) -> int:
        return len(self._generators)

    def draw(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(b, *shape): standard normal, drawn in float64 and rounded to `dtype`."""
        rows = [torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for generator in self._generators]
        return torch.stack(rows).to(device=device, dtype=dtype)


def _mix(seed: int, stream: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "big") >> 1
