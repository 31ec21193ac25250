"""What a training step makes of a batch: clean and noisy pictures or embeddings, and the conditioning."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_core.diffusion import Denoiser, DenoiserConfig, PriorConfig
from imagen_core.models.conditioning import Conditioning, unit_variance
from imagen_core.train.augment import blur
from imagen_core.train.config import TrainConfig
from imagen_core.train.data import Batch
from imagen_core.train.padding import few_lengths
from imagen_core.train.randomness import BLUR, IMAGE_EMBED, SELF_CONDITIONING, Draws, draw, draw_uniform, mix
from imagen_core.train.times import TimeSampler
from imagen_core.train.writing import with_transcriptions


@dataclass(frozen=True, slots=True)
class Example:
    """What the loss needs, on the device.

    Attributes:
        x0, noise: (b, c, h, w), or (b, dim) for a prior.
        sigma: (b,).
        weight: (b,), what each loss counts.
        shown_estimate: bool (b,), rows whose network is shown its own estimate; None if it reads none.
    """

    x0: Tensor
    sigma: Tensor
    weight: Tensor
    noise: Tensor
    conditioning: Conditioning
    shown_estimate: Tensor | None = None


def make_example(
    batch: Batch,
    config: TrainConfig,
    denoiser: Denoiser,
    device: torch.device,
    step: int,
    times: TimeSampler | None = None,
) -> Example:
    """Pictures or embeddings of a batch with their noise, noise levels, blur and dropped conditions.

    Noise levels are uniform in the schedule's time without `times`.

    An empty batch becomes one row of zeros, so that this process takes part in collectives; its loss counts 0.
    """
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    settings = config.denoiser
    pictures = settings if isinstance(settings, DenoiserConfig) else None
    side = (settings.shape[0], config.side_px, config.side_px) if pictures else settings.shape
    low_res = pictures is not None and pictures.low_res_px is not None
    draws = draw(config.seed, batch.counters or range(1), side, low_res=low_res, device=device)

    conditioning = _conditions(batch, config, draws, device, dtype)
    texts = batch.raw.get("transcriptions")
    conditioning = with_transcriptions(conditioning, texts, batch.counters or range(1), config, device)
    if isinstance(settings, PriorConfig):
        assert conditioning.image_embed is not None
        x0 = settings.to_length(conditioning.image_embed)
        conditioning = replace(conditioning, image_embed=None)
    else:
        x0 = _pixels(batch.images[settings.size_px], device, dtype)
        memory = torch.channels_last if config.channels_last else torch.contiguous_format
        x0 = x0.contiguous(memory_format=memory)
    if low_res:
        conditioning = _with_low_res(batch, config, denoiser, conditioning, draws, step)
    time, weight = (draws.time, torch.ones_like(draws.time)) if times is None else times.choose(draws.time)
    sigma = settings.diffusion.schedule.sigma(time).to(device)
    shown = None
    if settings.network.self_conditioning:
        uniform = draw_uniform(config.seed, batch.counters or range(1), stream=SELF_CONDITIONING, count=1)
        shown = (uniform[:, 0] < config.self_conditioning_fraction).to(device)
    return Example(x0, sigma, weight.to(device, dtype), draws.noise.to(dtype), conditioning, shown)


def whole_conditions(raw: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Conditioning:
    """Captions and embeddings of what the store's loader gives, nothing dropped."""

    def moved(name: str) -> Tensor | None:
        return _one_row(raw[name]).to(device, non_blocking=True) if name in raw else None

    text, text_embed, image_embed = moved("text"), moved("text_embed"), moved("image_embed")
    return Conditioning(
        text=None if text is None else text.to(dtype),
        text_mask=moved("text_mask"),
        text_embed=None if text_embed is None else unit_variance(text_embed.to(dtype)),
        image_embed=None if image_embed is None else unit_variance(image_embed.to(dtype)),
    )


def _conditions(
    batch: Batch, config: TrainConfig, draws: Draws, device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """Captions and picture embeddings, some of them to be dropped."""
    conditioning = whole_conditions(batch.raw, device, dtype)
    if config.compile and conditioning.text is not None and conditioning.text_mask is not None:
        text, mask = _few_lengths(conditioning.text, conditioning.text_mask, config.max_tokens)
        conditioning = replace(conditioning, text=text, text_mask=mask)
    if conditioning.has("text"):
        keep = draws.uniform[:, 0] >= config.caption_dropout
        conditioning = replace(conditioning, text_keep=keep.to(device))
    if conditioning.has("image_embed"):
        uniform = draw_uniform(config.seed, batch.counters or range(1), stream=IMAGE_EMBED, count=1)
        keep = uniform[:, 0] >= config.image_embed_dropout
        conditioning = replace(conditioning, image_embed_keep=keep.to(device))
    return conditioning


def _with_low_res(
    batch: Batch, config: TrainConfig, denoiser: Denoiser, conditioning: Conditioning, draws: Draws, step: int
) -> Conditioning:
    """Adds the low-resolution picture, blurred and noised as the configuration says."""
    settings, noise = config.denoiser, draws.low_res_noise
    assert isinstance(settings, DenoiserConfig)
    assert settings.low_res_px is not None
    assert noise is not None
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    low_res = _pixels(batch.images[settings.low_res_px], noise.device, dtype)
    if config.low_res_blur is not None:
        uniform = draw_uniform(config.seed, batch.counters or range(1), stream=BLUR, count=2)
        low_res = blur(low_res, config.low_res_blur, uniform)
    sigma = torch.zeros(len(low_res), dtype=torch.float64)
    if settings.low_res_noise is not None:
        level = draws.uniform[:, 1]
        if settings.low_res_noise.per == "batch":
            level = torch.full_like(level, mix(config.seed, step, 3) / 2**63)
        sigma = settings.low_res_noise.sigma(level)
    return denoiser.with_low_res(conditioning, low_res, sigma.to(noise.device), noise.to(dtype))


def _few_lengths(text: Tensor, mask: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Padded so that a network is compiled for four lengths only."""
    more = few_lengths(text.shape[1], max_tokens) - text.shape[1]
    return F.pad(text, (0, 0, 0, more)), F.pad(mask, (0, more))


def _pixels(pixels: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """uint8 (b, c, h, w) -> [-1, 1]."""
    return _one_row(pixels).to(device, non_blocking=True).to(dtype).div(127.5).sub(1)


def _one_row(tensor: Tensor) -> Tensor:
    """One row of zeros instead of none."""
    return tensor if len(tensor) else tensor.new_zeros(1, *(max(1, side) for side in tensor.shape[1:]))
