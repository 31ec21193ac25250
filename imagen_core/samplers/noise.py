"""Random numbers of sampling: one generator per image, so that an image does not depend on its batch."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """The source of a sampler's standard normal numbers."""

    def __len__(self) -> int: ...
    def normal(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor: ...


class SeededNoise:
    """Standard normal numbers; the numbers of image i depend only on seeds[i], the stream and the previous calls.

    Numbers are made on the CPU, so a seed means the same image on every device.
    """

    def __init__(self, seeds: Sequence[int], stream: int = 0):
        """`stream` keeps numbers for different purposes (the stages of a cascade) independent."""
        self._generators = [torch.Generator().manual_seed(_mix(seed, stream)) for seed in seeds]

    def __len__(self) -> int:
        return len(self._generators)

    def normal(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(b, *shape): standard normal, sampled in float64 and rounded to `dtype`."""
        rows = [torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for generator in self._generators]
        return torch.stack(rows).to(device=device, dtype=dtype)


def _mix(seed: int, stream: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "big") >> 1
