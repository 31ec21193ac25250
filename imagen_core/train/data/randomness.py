"""The random numbers of training, without a state.

What is drawn for a training sample depends on the seed and on how many samples were consumed before it, and on
nothing else: not on the process, the number of processes, or how a batch is cut. So a resumed run, or one with
another number of processes, draws the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0.6180339887498949
_MASK = (1 << 64) - 1

CUT, BLUR, IMAGE_EMBED, TRANSCRIPTION, SELF_CONDITIONING, LABEL, ALL, GRAYSCALE = range(
    10, 18
)  # beside `RandomNumbers`


@dataclass(frozen=True, slots=True)
class RandomNumbers:
    """Random numbers of some training samples, row by row.

    Attributes:
        time: float64 (b,) in [0, 1), decides the noise level. The times of a run fill [0, 1) evenly (a Weyl
            sequence), which makes the loss less noisy (as in Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
        uniform: float64 (b, 5) in [0, 1): caption dropout, noise level of low_res, crop (2), flip.
        noise, low_res_noise: (b, c, h, w), standard normal; low_res_noise is None where there is no low_res.
    """

    time: Tensor
    uniform: Tensor
    noise: Tensor
    low_res_noise: Tensor | None


def draw(
    seed: int, counters: Sequence[int], shape: tuple[int, ...], *, low_res: bool, device: torch.device
) -> RandomNumbers:
    """Numbers for the samples with these counters, for images of `shape` (c, h, w), or embeddings of (dim,)."""
    generator = torch.Generator(device)
    noise = torch.empty(len(counters), *shape, device=device)
    low_res_noise = torch.empty_like(noise) if low_res else None
    for row, counter in enumerate(counters):
        generator.manual_seed(mix(seed, counter, 1))
        noise[row].normal_(generator=generator)
        if low_res_noise is not None:
            low_res_noise[row].normal_(generator=generator)
    start = mix(seed, 0, 2) / 2**63
    time = torch.tensor([(start + counter * _GOLDEN) % 1.0 for counter in counters], dtype=torch.float64)
    return RandomNumbers(time, draw_uniform(seed, counters), noise, low_res_noise)


def draw_uniform(seed: int, counters: Sequence[int], *, stream: int = 0, count: int = 5) -> Tensor:
    """`RandomNumbers.uniform` alone; or of another stream, float64 (b, count) in [0, 1)."""
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
