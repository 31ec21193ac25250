"""Small networks and inputs for the tests of this folder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.transformer.model import TransformerConfig
from imagen_core.models.unet.base import UNetBaseConfig
from imagen_core.models.unet.block import Level
from imagen_core.models.unet.efficient import EfficientUNetConfig
from imagen_core.models.unet.regular import RegularUNetConfig

ModuleT = TypeVar("ModuleT", bound=nn.Module)
TEXT_DIM = 12


def regular(**changes: Any) -> RegularUNetConfig:
    """Two levels, 16 px, attention at 8 px."""
    options = {
        "image_size_px": 16,
        "embed_dim": 32,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
        "head_dim": 16,
        "text_dim": TEXT_DIM,
        "cond_dim": 24,
    }
    return RegularUNetConfig.model_validate(options | changes)


def efficient(**changes: Any) -> EfficientUNetConfig:
    """Two levels, 16 px, attention at the deeper one, super-resolution."""
    options = {
        "image_size_px": 16,
        "embed_dim": 32,
        "channel_mult": (1, 2),
        "num_res_blocks": (1, 2),
        "attention_levels": (False, True),
        "head_dim": 16,
        "text_dim": TEXT_DIM,
    }
    return EfficientUNetConfig.model_validate(options | changes)


def transformer(**changes: Any) -> TransformerConfig:
    """Four blocks on 4 x 4 patches of 4 px, 16 px, two heads."""
    options = {
        "image_size_px": 16,
        "patch_px": 4,
        "bottleneck_dim": 10,
        "dim": 32,
        "depth": 4,
        "num_heads": 2,
        "text_dim": TEXT_DIM,
    }
    return TransformerConfig.model_validate(options | changes)


NO_EFFECT = ("inputs.text.pool.score.bias",)
"""Parameters of published models that change nothing: a softmax does not see what is added to all its scores."""
FAMILIES = {"regular": regular, "efficient": efficient}


def blocks_of(level: Level) -> list[Any]:
    """The blocks of a level."""
    return list(level.blocks)


def random_weights(module: ModuleT, seed: int = 0) -> ModuleT:
    """Fills every parameter, so that no branch is silent as it is in a new model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 4
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5
            parameter.copy_(values)
    return module


def calls_of(blocks: Sequence[nn.Module], model: nn.Module, *arguments: Any) -> tuple[list[int], list[int]]:
    """How often each block is called in the model's forward pass, and then in the backward pass."""
    counts = [0] * len(blocks)

    def count(index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            counts[index] += 1

        return hook

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(count(index))
    loss = model(*arguments).square().mean()
    forward = list(counts)
    loss.backward()
    return forward, [total - before for total, before in zip(counts, forward, strict=True)]


def inputs(
    config: UNetBaseConfig,
    *,
    lengths: tuple[int, ...] = (3, 5),
    padded_to: int = 6,
    side_px: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Conditioning]:
    """x, c_noise and all the conditions the model reads; captions of these lengths in tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    batch = len(lengths)
    x, c_noise = normal(batch, config.in_channels, side_px, side_px), normal(batch)
    low_res, low_res_noise = normal(batch, config.in_channels, side_px, side_px), normal(batch)
    text = mask = None
    if isinstance(config.text_dim, int):
        text, mask = captions(lengths, padded_to, config.text_dim, dtype=dtype)
    conditioning = replace(
        other_conditions(config, batch, dtype, side_px=side_px),
        text=text,
        text_mask=mask,
        low_res=low_res if config.low_res else None,
        low_res_noise=low_res_noise if config.low_res_noise else None,
    )
    return x, c_noise, conditioning


def other_conditions(
    config: UNetBaseConfig, batch: int, dtype: torch.dtype = torch.float32, side_px: int = 16
) -> Conditioning:
    """Conditions that are neither captions nor low-resolution images, as far as the model reads them."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)

    return Conditioning(
        labels=None if config.num_classes is None else torch.arange(batch),
        image_embed=None if config.image_embed_dim is None else normal(config.image_embed_dim),
        image_embed_keep=None if config.image_embed_dim is None else torch.arange(batch) % 2 == 0,
        images=normal(config.condition_channels, side_px, side_px) if config.condition_channels else None,
        estimate=normal(config.in_channels, side_px, side_px) if config.self_conditioning else None,
    )


def captions(
    lengths: tuple[int, ...], padded_to: int, text_dim: int = TEXT_DIM, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Zero-padded embeddings and mask; the real tokens do not depend on `padded_to`."""
    text = torch.zeros(len(lengths), padded_to, text_dim, dtype=dtype)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 + row)
        text[row, :length] = torch.randn(length, text_dim, generator=generator, dtype=torch.float64).to(dtype)
    return text, torch.arange(padded_to) < torch.tensor(lengths)[:, None]
