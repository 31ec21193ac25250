"""Conditions left out in training, so that guidance has models without them (Ho and Salimans 2022)."""

from collections.abc import Sequence
from typing import get_args

import torch

from imagen_core.models import Conditioning
from imagen_core.models.conditioning.base import Condition
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.randomness import ALL, IMAGE_EMBED, LABEL, TRANSCRIPTION, draw_uniform

_RATES = {
    "text": ("caption_dropout", 0),
    "transcription": ("transcription_dropout", TRANSCRIPTION),
    "labels": ("label_dropout", LABEL),
    "image_embed": ("image_embed_dropout", IMAGE_EMBED),
}
"""Setting and stream of random numbers of each condition."""

NO_DROPOUT = dict.fromkeys(("all_dropout", *(setting for setting, _ in _RATES.values())), 0.0)
"""Settings with which nothing is left out."""


def drop_conditions(
    conditioning: Conditioning, counters: Sequence[int], config: TrainConfig, device: torch.device
) -> Conditioning:
    """Takes each condition away from some rows, and all of them from some.

    What a sample keeps depends on the seed and its counter alone.
    """
    keep_any = _kept(ALL, config.all_dropout, counters, config.seed)
    for condition in get_args(Condition):
        if condition in _RATES and conditioning.has(condition):
            setting, stream = _RATES[condition]
            keep = _kept(stream, getattr(config, setting), counters, config.seed) & keep_any
            conditioning = conditioning.with_keep(condition, keep.to(device))
    return conditioning


def _kept(stream: int, rate: float, counters: Sequence[int], seed: int) -> torch.Tensor:
    """bool (b,); nothing is drawn where nothing is left out."""
    if not rate:
        return torch.ones(len(counters), dtype=torch.bool)
    return draw_uniform(seed, counters, stream=stream, count=1)[:, 0] >= rate
