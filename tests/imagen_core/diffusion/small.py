"""A small denoiser with a real UNet, and one whose UNet is any function: the same for all tests here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from imagen_core.diffusion import Denoiser, DenoiserConfig

UNET = {
    "family": "regular",
    "image_size_px": 8,
    "embed_dim": 32,
    "channel_mult": [1],
    "num_res_blocks": 1,
    "attention_resolutions": [8],
    "head_dim": 16,
    "text_dim": 8,
    "cond_dim": 16,
}


def small_denoiser(*, unet: dict[str, Any] | None = None, **changes: Any) -> Denoiser:
    """A base model of 8 px."""
    settings = {"unet": UNET | (unet or {}), "size_px": 8} | changes
    return Denoiser(DenoiserConfig.model_validate(settings))


def small_super_denoiser(*, unet: dict[str, Any] | None = None, **changes: Any) -> Denoiser:
    """A super-resolution model from 4 to 8 px that reads the noise level of its low-resolution image."""
    settings = {"low_res_px": 4, "low_res_noise": {"kind": "lognormal"}} | changes
    return small_denoiser(unet={"low_res": True, "low_res_noise": True} | (unet or {}), **settings)


def with_random_weights(denoiser: Denoiser, seed: int) -> Denoiser:
    """All weights random, also those that start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in denoiser.parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return denoiser.eval()


class FunctionUNet(nn.Module):
    """Stands in for a UNet; remembers what it was called with."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, *inputs: Any) -> Tensor:
        self.calls.append(inputs)
        return self.function(*inputs)


def stub(denoiser: Denoiser, function: Callable[..., Tensor]) -> FunctionUNet:
    """Replaces the denoiser's UNet by function(x, c_noise, conditioning)."""
    denoiser.net = FunctionUNet(function)
    return denoiser.net
