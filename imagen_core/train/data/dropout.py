"""Conditions dropped in training, so that guidance has models without them (Ho and Salimans 2022)."""

from collections.abc import Sequence

import torch

from imagen_core.models import Conditioning
from imagen_core.models.conditioning.base import Condition
from imagen_core.train.components import ConditioningDropoutConfig
from imagen_core.train.data.randomness import RandomStream, SampleColumn, sample_uniform

_STREAMS: dict[Condition, RandomStream] = {
    "text": RandomStream.SAMPLE,
    "transcription": RandomStream.DROP_TRANSCRIPTION,
    "labels": RandomStream.DROP_LABELS,
    "image_embed": RandomStream.DROP_IMAGE_EMBED,
}
"""The random numbers that drop each condition: the first column of the stream."""
assert SampleColumn.DROP_TEXT == 0

NO_DROPOUT = ConditioningDropoutConfig(**dict.fromkeys(ConditioningDropoutConfig.model_fields, 0.0))
"""Settings with which nothing is dropped."""


def drop_conditions(
    conditioning: Conditioning,
    counters: Sequence[int],
    rates: ConditioningDropoutConfig,
    seed: int,
    device: torch.device,
) -> Conditioning:
    """Takes each condition away from some rows, and all of them from some.

    What a sample keeps depends on the seed and its counter alone.
    """
    keep_any = _kept(RandomStream.DROP_ALL, rates.all, counters, seed)
    for condition, stream in _STREAMS.items():
        if conditioning.has(condition):
            keep = _kept(stream, getattr(rates, condition), counters, seed) & keep_any
            conditioning = conditioning.with_keep(condition, keep.to(device))
    return conditioning


def _kept(stream: RandomStream, rate: float, counters: Sequence[int], seed: int) -> torch.Tensor:
    """bool (b,); no number is sampled where nothing is dropped."""
    if not rate:
        return torch.ones(len(counters), dtype=torch.bool)
    return sample_uniform(seed, counters, stream, count=1)[:, 0] >= rate
