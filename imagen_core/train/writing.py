"""The text to be written in the pictures, as a step reads it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from imagen_core.diffusion import PriorConfig
from imagen_core.models import Conditioning
from imagen_core.models.characters import character_ids
from imagen_core.models.transcription import TranscriptionConfig
from imagen_core.store import Store
from imagen_core.train.config import TrainConfig
from imagen_core.train.errors import TrainError
from imagen_core.train.padding import few_lengths
from imagen_core.train.randomness import TRANSCRIPTION, draw_uniform

_SHARDS_TO_ASK = 16


def reads_transcriptions(config: TrainConfig) -> bool:
    """Whether the model reads the text to be written in a picture."""
    return _settings(config) is not None


def _settings(config: TrainConfig) -> TranscriptionConfig | None:
    return None if isinstance(config.denoiser, PriorConfig) else config.denoiser.unet.transcription


def check_transcriptions(store: Store, config: TrainConfig) -> None:
    """Raises TrainError if the model reads transcriptions and the first shards have none."""
    if not reads_transcriptions(config):
        return
    for shard in range(min(_SHARDS_TO_ASK, store.manifest.num_shards)):
        samples = store.shard(shard).samples
        if any(samples.transcription(row) is not None for row in range(samples.num_rows)):
            return
    raise TrainError(
        f"denoiser.unet.transcription: the store {config.store} has no transcriptions; name their column with "
        "`pipeline run precompute` and source.transcription_column, or set denoiser.unet.transcription=null"
    )


def with_transcriptions(
    conditioning: Conditioning,
    texts: Sequence[str] | None,
    counters: Sequence[int],
    config: TrainConfig,
    device: torch.device,
) -> Conditioning:
    """Adds the characters of `texts`, one a picture, some of them left out; nothing if the model reads none."""
    settings = _settings(config)
    if settings is None or texts is None:
        return conditioning
    ids = character_ids(texts or [""], settings.max_characters, cut=True)
    if config.compile:
        ids = F.pad(ids, (0, few_lengths(ids.shape[1], settings.max_characters) - ids.shape[1]))
    uniform = draw_uniform(config.seed, counters, stream=TRANSCRIPTION, count=1)[:, 0]
    return replace(
        conditioning,
        characters=ids.to(device, non_blocking=True),
        characters_keep=(uniform >= config.transcription_dropout).to(device),
    )
