"""The random numbers of training, without a state.

What is sampled for a training sample depends on the seed and on how many samples were consumed before it, and on
nothing else: not on the process, the number of processes, or how a batch is split. So a resumed run, or one with
another number of processes, uses the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = 0.6180339887498949
_MASK = (1 << 64) - 1


class RandomStream(IntEnum):
    """What random numbers are for: each stream is hashed into its seeds by `mix`.

    The values are part of every training's numbers and must not change.
    """

    SAMPLE = 0
    """By sample: the columns of `SampleColumn`."""
    NOISE = 1
    """By sample: the noise of the image or embedding, then that of its low-resolution image."""
    TIME = 2
    """Once: where the times of a run start."""
    BATCH_LOW_RES_NOISE = 3
    """By step: one noise level for the low-resolution images of a batch."""
    VALIDATION = 4
    """Once: the seed of validation."""
    WEIGHTS = 5
    """Once: the initial weights."""
    NETWORK_DROPOUT = 6
    """By step and process: dropout in the network."""
    RESIZED_CROP = 10
    """By sample: whether it is cropped, and the area."""
    LOW_RES_BLUR = 11
    """By sample: whether it is blurred, and how much."""
    DROP_IMAGE_EMBED = 12
    DROP_TRANSCRIPTION = 13
    SELF_CONDITIONING = 14
    DROP_LABELS = 15
    DROP_ALL = 16
    LOW_RES_GRAYSCALE = 17
    LOW_RES_JPEG = 18
    """By sample: whether it is compressed, and how much."""
    LOW_RES_TINT = 19
    """By sample: whether it is tinted, and the colour."""
    PROJECTOR = 20
    """Once: the initial weights of the projector of an alignment."""


class SampleColumn(IntEnum):
    """Columns of the random numbers of `RandomStream.SAMPLE`."""

    DROP_TEXT = 0
    LOW_RES_NOISE = 1
    CROP_TOP = 2
    CROP_LEFT = 3
    FLIP = 4


@dataclass(frozen=True, slots=True)
class RandomNumbers:
    """Random numbers of some training samples, row by row.

    Attributes:
        time: float64 (b,) in [0, 1), decides the noise level. The times of a run fill [0, 1) evenly (a Weyl
            sequence), which makes the loss less noisy (as in Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
        uniform: float64 (b, 5) in [0, 1), the columns of `SampleColumn`.
        noise, low_res_noise: (b, c, h, w), standard normal; low_res_noise is None where there is no low_res.
    """

    time: Tensor
    uniform: Tensor
    noise: Tensor
    low_res_noise: Tensor | None


def sample_numbers(
    seed: int, counters: Sequence[int], shape: tuple[int, ...], *, low_res: bool, device: torch.device
) -> RandomNumbers:
    """Numbers for the samples with these counters, for images of `shape` (c, h, w), or embeddings of (dim,)."""
    generator = torch.Generator(device)
    noise = torch.empty(len(counters), *shape, device=device)
    low_res_noise = torch.empty_like(noise) if low_res else None
    for row, counter in enumerate(counters):
        generator.manual_seed(mix(seed, counter, RandomStream.NOISE))
        noise[row].normal_(generator=generator)
        if low_res_noise is not None:
            low_res_noise[row].normal_(generator=generator)
    start = mix(seed, 0, RandomStream.TIME) / 2**63
    time = torch.tensor([(start + counter * _GOLDEN) % 1.0 for counter in counters], dtype=torch.float64)
    uniform = sample_uniform(seed, counters, RandomStream.SAMPLE, len(SampleColumn))
    return RandomNumbers(time, uniform, noise, low_res_noise)


def sample_uniform(seed: int, counters: Sequence[int], stream: RandomStream, count: int) -> Tensor:
    """The first `count` uniform numbers of a stream for each sample, float64 (b, count) in [0, 1)."""
    generator = torch.Generator()
    uniform = torch.empty(len(counters), count, dtype=torch.float64)
    for row, counter in enumerate(counters):
        generator.manual_seed(mix(seed, counter, stream))
        torch.rand(count, generator=generator, dtype=torch.float64, out=uniform[row])
    return uniform


def mix(*values: int) -> int:
    """Hashes integers to one in [0, 2^63) (rounds of SplitMix64, Steele et al. 2014)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
