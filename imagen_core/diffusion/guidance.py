"""Classifier-free guidance and thresholding, wrapped around a denoiser for the samplers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from imagen_core.config import Config
from imagen_core.diffusion.denoiser import Denoiser
from imagen_core.models import Conditioning, cat

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (b, c, h, w), sigma scalar tensor) -> estimate of x0 (b, c, h, w); all a sampler needs to know."""


class Guidance(Config):
    """Weights of classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598); 1 is none, 0 ignores it."""

    text: float = 1.0
    """Weight of the caption."""
    low_res: float = 1.0
    """Weight of the low-resolution picture, against a grey one."""
    two_passes: bool = False
    """Run the conditional and the unconditional batch one after the other: slower, half the memory."""


class Threshold(Config):
    """Clipping of the estimated picture at each step (Saharia et al. 2022, arXiv 2205.11487, section 2.3)."""

    kind: Literal["none", "static", "dynamic"] = "dynamic"
    """static clips to [-1, 1]; dynamic clips to a percentile of each picture and rescales."""
    percentile: float = Field(default=0.995, gt=0, le=1)
    """Part of the absolute values that dynamic thresholding keeps."""
    cap: float | None = Field(default=None, ge=1)
    """Largest divisor of dynamic thresholding; null: none."""

    def __call__(self, x0: Tensor) -> Tensor:
        """(b, c, h, w) -> the same, clipped."""
        if self.kind == "none":
            return x0
        if self.kind == "static":
            return x0.clamp(-1, 1)
        limit = torch.quantile(x0.abs().flatten(1).float(), self.percentile, dim=1).to(x0.dtype)
        limit = limit.clamp(min=1, max=self.cap)[:, None, None, None]
        return x0.clamp(-limit, limit) / limit


def guided(denoiser: Denoiser, conditioning: Conditioning, guidance: Guidance, threshold: Threshold) -> Denoise:
    """A function of (x, sigma) alone: guidance first, then the threshold.

    With conditions taken away one by one, D = D_0 + w_low_res (D_low_res - D_0) + w_text (D_all - D_low_res). Only
    the terms with a weight are computed: with all weights 1 the network runs once.
    """
    terms = _terms(conditioning, guidance)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.to(x).expand(len(x))
        if guidance.two_passes or len(terms) == 1:
            estimates = [denoiser(x, level, condition) for _, condition in terms]
        else:
            count = len(terms)
            joined = cat([condition for _, condition in terms])
            estimates = list(denoiser(x.repeat(count, 1, 1, 1), level.repeat(count), joined).chunk(count))
        total = torch.zeros_like(x)
        for (weight, _), estimate in zip(terms, estimates, strict=True):
            total = total + weight * estimate
        return threshold(total)

    return denoise


def _terms(conditioning: Conditioning, guidance: Guidance) -> list[tuple[float, Conditioning]]:
    """Denoiser inputs and the weight of each in the sum; those of weight 0 left out."""
    with_all = conditioning
    without_text = conditioning.unconditional()
    without_any = without_text
    if without_text.low_res is not None:
        without_any = replace(without_text, low_res=torch.zeros_like(without_text.low_res))
    text = guidance.text if conditioning.text is not None else 1.0
    low_res = guidance.low_res if conditioning.low_res is not None else text
    weights = [(text, with_all), (low_res - text, without_text), (1 - low_res, without_any)]
    return [(weight, condition) for weight, condition in weights if weight != 0]
