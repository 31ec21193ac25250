"""What a training step computes from a batch: clean images or embeddings, their noise, and the conditioning."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_core.diffusion import Denoiser, DenoiserConfig, PriorConfig
from imagen_core.images import in_range
from imagen_core.models import UNetConfig
from imagen_core.models.conditioning.base import Conditioning, Tokens, unit_variance
from imagen_core.models.conditioning.characters import character_ids
from imagen_core.models.prior import PriorNetworkConfig
from imagen_core.train.augment import blur, grayscale, jpeg, tint
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.dropout import drop_conditions
from imagen_core.train.data.noise_levels import NoiseLevelSampler
from imagen_core.train.data.padding import bucket_length
from imagen_core.train.data.randomness import (
    RandomNumbers,
    RandomStream,
    SampleColumn,
    mix,
    sample_numbers,
    sample_uniform,
)
from imagen_core.train.data.store_images import condition_images
from imagen_core.train.data.stream import Batch
from imagen_core.train.errors import TrainError
from imagen_core.train.parallel.precision import weights_dtype


@dataclass(frozen=True, slots=True)
class Example:
    """What the loss needs, on the device.

    Attributes:
        x0, noise: (b, c, h, w), or (b, dim) for a prior.
        sigma: (b,).
        weight: (b,), factor of each loss.
        shown_estimate: bool (b,), rows whose network is shown its own estimate; None if it reads no estimate.
        features: (b, rows, columns, dim), what an image encoder makes of the images' patches; None in a step that is
            not aligned with them.
    """

    x0: Tensor
    sigma: Tensor
    weight: Tensor
    noise: Tensor
    conditioning: Conditioning
    shown_estimate: Tensor | None = None
    features: Tensor | None = None


def make_example(
    batch: Batch,
    config: TrainConfig,
    denoiser: Denoiser,
    device: torch.device,
    step: int,
    noise_levels: NoiseLevelSampler | None = None,
    null_text: Tensor | None = None,
) -> Example:
    """Images or embeddings of a batch with their noise, noise levels, blur and dropped conditions.

    Noise levels are uniform in the schedule's time without `noise_levels`; `null_text` is that of the context.

    An empty batch becomes one row of zeros, so that this process takes part in collectives; its loss has weight 0.
    """
    dtype, settings = weights_dtype(config.precision), config.denoiser
    images = settings if isinstance(settings, DenoiserConfig) else None
    shape = settings.shape if images is None else (images.shape[0], *batch.images[images.size_px].shape[-2:])
    low_res = images is not None and images.low_res_px is not None
    numbers = sample_numbers(config.seed, batch.counters or range(1), shape, low_res=low_res, device=device)

    conditioning = _conditions(batch, config, device, dtype, null_text)
    if isinstance(settings, PriorConfig):
        assert conditioning.image_embed is not None
        x0 = settings.to_length(conditioning.image_embed)
        conditioning = replace(conditioning, image_embed=None)
    else:
        x0 = _pixels(batch.images[settings.size_px], device, dtype)
        memory = torch.channels_last if config.compute.channels_last else torch.contiguous_format
        x0 = x0.contiguous(memory_format=memory)
        further = condition_images(batch.raw, config.condition_images, (x0.shape[-2], x0.shape[-1]), device, dtype)
        conditioning = replace(conditioning, images=further)
    if low_res:
        conditioning = _with_low_res(batch, config, denoiser, conditioning, numbers, step)
    time, weight = numbers.time, torch.ones_like(numbers.time)
    if noise_levels is not None:
        time, weight = noise_levels.choose(time)
    sigma = settings.diffusion.schedule.sigma(time).to(device)
    shown = None
    if settings.network.self_conditioning:
        uniform = sample_uniform(config.seed, batch.counters or range(1), RandomStream.SELF_CONDITIONING, count=1)
        shown = (uniform[:, 0] < config.self_conditioning_fraction).to(device)
    features = None
    if config.alignment is not None and config.alignment.acts(step) and "features" in batch.raw:
        features = _one_row(batch.raw["features"]).to(device, non_blocking=True)
    return Example(x0, sigma, weight.to(device, dtype), numbers.noise.to(dtype), conditioning, shown, features)


def all_conditions(
    raw: Mapping[str, Any], network: UNetConfig | PriorNetworkConfig, device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """What the network reads of a batch of the store's loader besides the images, with nothing dropped.

    Raises:
        TrainError: a label that is not a class of the network.
    """
    characters = None
    if not isinstance(network, PriorNetworkConfig):
        _check_labels(raw, network.num_classes)
        if network.transcription is not None:
            texts = raw["transcriptions"] or [""]
            characters = character_ids(texts, network.transcription.max_characters, truncate=True).to(device)

    def moved(name: str) -> Tensor | None:
        return _one_row(raw[name]).to(device, non_blocking=True) if name in raw else None

    def moved_tokens(name: str, dtype: torch.dtype | None = None) -> Tokens | None:
        def move(tensor: Tensor) -> Tensor:
            return _one_row(tensor).to(device, non_blocking=True).to(dtype or tensor.dtype)

        tokens = raw.get(name)
        if isinstance(tokens, Mapping):
            return tuple(map(move, tokens.values()))
        return None if tokens is None else move(tokens)

    text_embed, image_embed = moved("text_embed"), moved("image_embed")
    return Conditioning(
        text=moved_tokens("text", dtype),
        text_mask=moved_tokens("text_mask"),
        text_embed=None if text_embed is None else unit_variance(text_embed.to(dtype)),
        image_embed=None if image_embed is None else unit_variance(image_embed.to(dtype)),
        labels=moved("labels"),
        characters=characters,
    )


def _check_labels(raw: Mapping[str, Any], num_classes: int | None) -> None:
    if num_classes is None or not (raw["labels"] >= num_classes).any():
        return
    row = int(raw["labels"].argmax())
    raise TrainError(
        f"denoiser.unet.num_classes is {num_classes}, but sample {raw['keys'][row]!r} has the label "
        f"{int(raw['labels'][row])}; labels count from 0: set num_classes to the highest + 1"
    )


def _conditions(
    batch: Batch, config: TrainConfig, device: torch.device, dtype: torch.dtype, null_text: Tensor | None
) -> Conditioning:
    """The conditions of each image, some of them dropped."""
    conditioning = all_conditions(batch.raw, config.denoiser.network, device, dtype)
    if null_text is not None:
        conditioning = conditioning.with_null_text(null_text)
    counters = batch.counters or range(1)
    conditioning = drop_conditions(conditioning, counters, config.conditioning_dropout, config.seed, device)
    conditioning = replace(conditioning, null_text=None, null_text_mask=None)
    return _bucket_lengths(conditioning, config) if config.compute.compile else conditioning


def _with_low_res(
    batch: Batch,
    config: TrainConfig,
    denoiser: Denoiser,
    conditioning: Conditioning,
    numbers: RandomNumbers,
    step: int,
) -> Conditioning:
    """Adds the low-resolution image, compressed, blurred, in other colours and noised as configured."""
    settings, views, noise = config.denoiser, config.views, numbers.low_res_noise
    assert isinstance(settings, DenoiserConfig)
    assert settings.low_res_px is not None
    assert noise is not None
    dtype, counters = weights_dtype(config.precision), batch.counters or range(1)
    pixels = batch.images[settings.low_res_px]
    if views.low_res_jpeg is not None:
        pixels = jpeg(pixels, views.low_res_jpeg, sample_uniform(config.seed, counters, RandomStream.LOW_RES_JPEG, 2))
    low_res = _pixels(pixels, noise.device, dtype)
    if views.low_res_blur is not None:
        uniform = sample_uniform(config.seed, counters, RandomStream.LOW_RES_BLUR, count=2)
        low_res = blur(low_res, views.low_res_blur, uniform)
    if views.low_res_grayscale:
        uniform = sample_uniform(config.seed, counters, RandomStream.LOW_RES_GRAYSCALE, count=1)
        low_res = grayscale(low_res, uniform[:, 0] < views.low_res_grayscale)
    if views.low_res_tint is not None:
        uniform = sample_uniform(config.seed, counters, RandomStream.LOW_RES_TINT, count=4)
        low_res = tint(low_res, views.low_res_tint, uniform)
    sigma = torch.zeros(len(low_res), dtype=torch.float64)
    if settings.low_res_noise is not None:
        level = numbers.uniform[:, SampleColumn.LOW_RES_NOISE]
        if settings.low_res_noise.per == "batch":
            level = torch.full_like(level, mix(config.seed, step, RandomStream.BATCH_LOW_RES_NOISE) / 2**63)
        sigma = settings.low_res_noise.sigma(level)
    return denoiser.with_low_res(conditioning, low_res, sigma.to(noise.device), noise.to(dtype))


def _bucket_lengths(conditioning: Conditioning, config: TrainConfig) -> Conditioning:
    """Captions and transcriptions padded so that a network is compiled for four lengths of each only."""

    def padded(text_or_mask: Tensor) -> Tensor:
        length = text_or_mask.shape[1]
        more = bucket_length(length, config.max_tokens) - length
        return F.pad(text_or_mask, (0, 0) * (text_or_mask.ndim - 2) + (0, more))

    conditioning, characters = conditioning.map_text(padded), conditioning.characters
    if characters is not None and config.transcription is not None:
        more = bucket_length(characters.shape[1], config.transcription.max_characters) - characters.shape[1]
        conditioning = replace(conditioning, characters=F.pad(characters, (0, more)))
    return conditioning


def _pixels(pixels: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """uint8 (b, c, h, w) -> [-1, 1]."""
    return in_range(_one_row(pixels).to(device, non_blocking=True), dtype)


def _one_row(tensor: Tensor) -> Tensor:
    """One row of zeros instead of no row."""
    return tensor if len(tensor) else tensor.new_zeros(1, *(max(1, side) for side in tensor.shape[1:]))
