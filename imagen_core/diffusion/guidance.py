"""Classifier-free guidance and thresholding, wrapped around a denoiser for the samplers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from imagen_core.config import Config, default_field
from imagen_core.diffusion.config import DiffusionConfig, PriorConfig
from imagen_core.diffusion.denoiser import Denoiser, column
from imagen_core.diffusion.variance import is_learned
from imagen_core.models.conditioning.base import Condition, Conditioning, cat

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (b, c, h, w), sigma scalar tensor) -> estimate of x0 (b, c, h, w): the only interface that samplers need."""

_ORDER: tuple[Condition, ...] = ("text", "transcription", "labels", "image_embed", "low_res")


class Guidance(Config):
    """Weights of classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598); 1 is no guidance, 0 ignores the
    condition."""

    text: float = 1.0
    """Weight of the caption."""
    transcription: float = 1.0
    """Weight of the text to be written in the image."""
    labels: float = 1.0
    """Weight of the class label."""
    image_embed: float = 1.0
    """Weight of the image embedding."""
    low_res: float = 1.0
    """Weight of the low-resolution image, against a mid-gray one."""
    autoguidance: float = default_field(1.0)
    """Weight of the model against its guide, a worse model with the same conditions (Karras et al. 2024, arXiv
    2406.02507); 1 is without it. Its difference is added to those of the conditions."""
    two_passes: bool = False
    """Run the conditional and the unconditional batch one after the other: slower, half the memory."""
    after_sigma: float | None = Field(default=None, gt=0)
    """Guide only at this noise level and below; null is from the first."""
    until_sigma: float | None = Field(default=None, gt=0)
    """Guide only at this noise level and above (Kynkäänniemi et al. 2024, arXiv 2404.07724); null is to the last."""

    @model_validator(mode="after")
    def _check(self) -> "Guidance":
        if self.after_sigma is not None and self.until_sigma is not None and self.after_sigma < self.until_sigma:
            raise ValueError(
                f"after_sigma must not be below until_sigma (got {self.after_sigma} and {self.until_sigma}): noise "
                "decreases while an image is sampled"
            )
        return self

    def applies(self, sigma: Tensor) -> bool:
        """Whether guidance is on at noise level sigma, a scalar tensor."""
        if self.after_sigma is None and self.until_sigma is None:
            return True  # without waiting for the device
        return (self.until_sigma or 0) <= float(sigma) <= (self.after_sigma or math.inf)


class Threshold(Config):
    """Clipping of the estimated image at each step (Saharia et al. 2022, arXiv 2205.11487, section 2.3)."""

    kind: Literal["none", "static", "dynamic", "length"] = "dynamic"
    """static clips to [-1, 1]; dynamic clips to a percentile of each image and rescales; length, for a prior, scales
    each embedding to the model's length."""
    percentile: float = Field(default=0.995, gt=0, le=1)
    """Fraction of the absolute values that dynamic thresholding does not clip."""
    cap: float | None = Field(default=None, ge=1)
    """Largest divisor of dynamic thresholding; null means no limit."""

    def __call__(self, x0: Tensor, length: float | None = None) -> Tensor:
        """Estimates (b, c, h, w), or (b, dim) of a prior -> the same shape.

        Args:
            length: length of a prior's embeddings; None for images.
        Raises:
            ValueError: kind=length without a length.
        """
        if self.kind == "none":
            return x0
        if self.kind == "length":
            if length is None:
                raise ValueError("threshold.kind=length is for a prior's embeddings; use dynamic or static")
            return F.normalize(x0, dim=-1) * length
        if self.kind == "static":
            return x0.clamp(-1, 1)
        limit = torch.quantile(x0.abs().flatten(1).float(), self.percentile, dim=1).to(x0.dtype)
        limit = limit.clamp(min=1, max=self.cap)
        limit = column(limit, x0)
        return x0.clamp(-limit, limit) / limit


@dataclass(frozen=True, slots=True)
class GuidedDenoiser:
    """A `Denoise` that also gives the learned variance of a step, and the estimate before the threshold.

    Attributes:
        unclipped: (x, sigma) -> the estimate of x0 before the threshold, and the channels for
            `variance.log_variance`, which are those with all conditions; None if the variance is fixed.
        diffusion: the model's configuration, with the kind of variance.
        clip: the threshold, of estimates (b, c, h, w).
    """

    unclipped: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
    diffusion: DiffusionConfig
    clip: Callable[[Tensor], Tensor] = field(default=lambda estimate: estimate)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.with_variance(x, sigma)[0]

    def with_variance(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        """The estimate of x0 after the threshold, and the channels as of `unclipped`."""
        estimate, channels = self.unclipped(x, sigma)
        return self.clip(estimate), channels


@dataclass(slots=True)
class _PreviousEstimate:
    """The previous step's estimate, for self-conditioning."""

    estimate: Tensor | None = None


def guided(
    denoiser: Denoiser,
    conditioning: Conditioning,
    guidance: Guidance,
    threshold: Threshold,
    guide: Denoiser | None = None,
) -> GuidedDenoiser:
    """A function of (x, sigma) alone, for one run of a sampler: guidance first, then the threshold.

    Conditions are dropped one after the other, in the order text, transcription, labels, image_embed, low_res. The
    difference that dropping a condition makes gets its weight: D = D_none + sum of w_i (D_with_i - D_without_i), where
    the conditions after i are still there. Terms whose weights cancel are not computed: with all weights 1 the network
    runs once. Autoguidance of weight w adds (w - 1) (D - D_guide), both with all conditions.

    Args:
        guide: reads the same conditions in the same form; needed for autoguidance.
    Raises:
        ValueError: autoguidance without a guide.
    """
    if guidance.autoguidance != 1 and guide is None:
        raise ValueError(f"guidance.autoguidance is {guidance.autoguidance:g}, but there is no guide; give one")
    length = denoiser.config.length if isinstance(denoiser.config, PriorConfig) else None
    within, outside = (
        _evaluations(_terms(conditioning, each), together=not guidance.two_passes) for each in (guidance, Guidance())
    )
    self_conditioning, previous = denoiser.config.network.self_conditioning, _PreviousEstimate()
    for_guide = conditioning.remembering()
    remembers = self_conditioning or (guide is not None and guide.config.network.self_conditioning)

    def output(x: Tensor, level: Tensor, condition: Conditioning) -> tuple[Tensor, Tensor | None]:
        learns = is_learned(denoiser.config.diffusion.variance)
        return denoiser.with_variance(x, level, condition) if learns else (denoiser(x, level, condition), None)

    def clip(estimate: Tensor) -> Tensor:
        return threshold(estimate, length)

    def unclipped(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        weights, conditions = within if (applies := guidance.applies(sigma)) else outside
        count = len(weights) // len(conditions)  # batches like x in one evaluation
        level, repeats = sigma.to(x).expand(len(x)), (count, *[1] * (x.ndim - 1))
        outputs: list[tuple[Tensor, Tensor | None]] = []
        for condition in conditions:
            if self_conditioning and previous.estimate is not None:
                condition = replace(condition, estimate=previous.estimate.repeat(repeats))
            outputs.append(output(x.repeat(repeats) if count > 1 else x, level.repeat(count), condition))
        estimates = [part for estimate, _ in outputs for part in estimate.chunk(count)]
        channels = None if outputs[0][1] is None else outputs[0][1][: len(x)]
        total = torch.zeros_like(x)
        for weight, estimate in zip(weights, estimates, strict=True):
            total = total + weight * estimate
        if guide is not None and applies and guidance.autoguidance != 1:
            total = total + (1 - guidance.autoguidance) * _of_guide(guide, x, level, for_guide, previous)
        if remembers:
            previous.estimate = clip(total)
        return total, channels

    return GuidedDenoiser(unclipped, denoiser.config.diffusion, clip)


def _of_guide(
    guide: Denoiser, x: Tensor, level: Tensor, conditioning: Conditioning, previous: _PreviousEstimate
) -> Tensor:
    if guide.config.network.self_conditioning:
        conditioning = replace(conditioning, estimate=previous.estimate)
    return guide(x, level, conditioning)


def _evaluations(terms: list[tuple[float, Conditioning]], *, together: bool) -> tuple[list[float], list[Conditioning]]:
    """The weights, and the conditions of each evaluation of the network: of all terms together, or of one each."""
    conditions = [condition for _, condition in terms]
    if together and len(conditions) > 1:
        conditions = [cat(conditions)]
    return [weight for weight, _ in terms], [condition.remembering() for condition in conditions]


def _terms(conditioning: Conditioning, guidance: Guidance) -> list[tuple[float, Conditioning]]:
    """The denoiser's inputs, each with its weight in the sum; without those of weight 0, unless all are."""
    terms: list[tuple[float, Conditioning]] = []
    current, before = conditioning, 0.0
    for condition in _ORDER:
        if not conditioning.has(condition):
            continue
        weight = getattr(guidance, condition)
        terms.append((weight - before, current))
        current, before = current.without(condition), weight
    terms.append((1 - before, current))
    first, everything = terms[0]
    terms[0] = (first + guidance.autoguidance - 1, everything)
    return [(weight, condition) for weight, condition in terms if weight != 0] or terms[:1]
