"""Sampling of image embeddings with a prior, and measures of how good they are.

Ramesh et al. 2022 (arXiv 2204.06125), section 2.2: several embeddings are generated for a caption, and the one that
is most similar to the caption's own embedding is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from imagen_core.config import Config
from imagen_core.diffusion import Denoiser, Guidance, PriorConfig, Threshold, guided
from imagen_core.diffusion.steps import AnyGrid, Uniform
from imagen_core.models import Conditioning
from imagen_core.samplers import Ddim, SeededNoise, sample
from imagen_core.samplers.registry import AnySampler

_STREAM = 1000  # of the noise; the stages of a cascade have the streams from 0


class PriorSamplingConfig(Config):
    """How a prior samples."""

    sampler: AnySampler = Ddim()
    """The solver."""
    grid: AnyGrid = Uniform()
    """Where the noise levels lie."""
    num_steps: int = Field(default=64, ge=1)
    """Noise levels to visit."""
    guidance: float = 1.0
    """Weight of the caption; 1 is no guidance."""
    threshold: Threshold = Threshold(kind="none")
    """none, or length, which scales each estimate to the embeddings' length."""
    num_candidates: int = Field(default=2, ge=1)
    """Embeddings generated per caption, of which the one most similar to the caption's is kept."""
    start_at_length: bool = False
    """Scale the initial noise to its root-mean-square length, the root of its dimension."""

    @model_validator(mode="after")
    def _check(self) -> "PriorSamplingConfig":
        if self.threshold.kind not in ("none", "length"):
            raise ValueError(f"threshold.kind: {self.threshold.kind} is for images; a prior takes none or length")
        return self


@torch.no_grad()
def generate_embeddings(
    denoiser: Denoiser,
    conditioning: Conditioning,
    seeds: Sequence[int],
    config: PriorSamplingConfig,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Generates one image embedding per caption; row i depends on its caption and seeds[i] alone.

    Args:
        conditioning: text_embed (b, dim) and, if the prior reads it, text with its mask; on the denoiser's device.
    Returns:
        (b, dim), unit vectors.
    Raises:
        ValueError: the denoiser is no prior, or the conditioning has no text_embed.
    """
    settings = denoiser.config
    if not isinstance(settings, PriorConfig):
        raise ValueError(
            "generate_embeddings: the denoiser generates images; give one whose configuration has kind: prior"
        )
    if conditioning.text_embed is None:
        raise ValueError("conditioning.text_embed: a prior reads the captions' embeddings; give text_embed")
    device = conditioning.text_embed.device
    denoise_with = Guidance(text=config.guidance)
    candidates = []
    for number in range(config.num_candidates):
        noise = SeededNoise(seeds, stream=_STREAM + number)
        embedding = sample(
            config.sampler,
            guided(denoiser, conditioning, denoise_with, config.threshold),
            config.grid.sigmas(settings.diffusion.schedule, config.num_steps),
            _AtLength(noise, settings) if config.start_at_length else noise,
            settings.shape,
            device=device,
            dtype=dtype,
            schedule=settings.diffusion.schedule,
        )
        candidates.append(F.normalize(embedding, dim=-1))
    stacked = torch.stack(candidates)  # (n, b, dim)
    likeness = torch.einsum("nbd,bd->nb", stacked, F.normalize(conditioning.text_embed.to(dtype), dim=-1))
    best = likeness.argmax(dim=0)
    return stacked[best, torch.arange(len(best), device=device)]


class _AtLength:
    """Noise whose first vector has the length that a standard normal vector has on average (root mean square)."""

    def __init__(self, noise: SeededNoise, settings: PriorConfig):
        self._noise, self._length, self._first = noise, settings.network.dim**0.5, True

    def __len__(self) -> int:
        return len(self._noise)

    def normal(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        noise = self._noise.normal(shape, device, dtype)
        if self._first:
            self._first = False
            return F.normalize(noise, dim=-1) * self._length
        return noise


@dataclass(frozen=True, slots=True)
class PriorSimilarities:
    """Mean cosines of generated embeddings (DALLE2-pytorch's prior.md names the five).

    Attributes:
        with_image: to the true image's embedding; the higher, the better.
        with_text: to the caption's embedding.
        with_unrelated_text: to another caption's embedding; if it is high, the prior ignores the caption.
        baseline: of captions' embeddings to their true images'; a prior helps if with_image is above it.
        above_baseline: with_text minus baseline; if it is far above 0, captions are copied.
    """

    with_image: float
    with_text: float
    with_unrelated_text: float
    baseline: float
    above_baseline: float


def prior_similarities(generated: Tensor, image_embed: Tensor, text_embed: Tensor) -> PriorSimilarities:
    """Mean cosines of (b, dim) embeddings; row i of each belongs to the same pair, and unrelated is row i - 1.

    Raises:
        ValueError: fewer than two pairs.
    """
    if len(generated) < 2:
        raise ValueError(f"prior_similarities: needs two pairs or more (got {len(generated)})")

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(F.cosine_similarity(a.double(), b.double(), dim=-1).mean())

    with_text, baseline = cosine(generated, text_embed), cosine(image_embed, text_embed)
    return PriorSimilarities(
        with_image=cosine(generated, image_embed),
        with_text=with_text,
        with_unrelated_text=cosine(generated, text_embed.roll(1, dims=0)),
        baseline=baseline,
        above_baseline=with_text - baseline,
    )
