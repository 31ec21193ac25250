"""What all UNet families do with their inputs before the first block."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imagen_core.models.conditioning import Conditioning
from imagen_core.models.embeddings import LearnedFourierEmbedding, NoiseEmbedding, SinusoidalEmbedding
from imagen_core.models.text import DroppedCaption, Pooling, TextConditioning


@dataclass(frozen=True, slots=True)
class Context:
    """What every block of a UNet is told.

    Attributes:
        time: (b, time_dim), the noise level with pooled text and labels, after its SiLU.
        tokens: (b, l, cond_dim) for attention, and mask bool (b, l); None without text.
    """

    time: Tensor
    tokens: Tensor | None
    mask: Tensor | None


class InputConfig(Protocol):
    """The fields of a UNet's configuration read here."""

    @property
    def text_dim(self) -> int | None: ...
    @property
    def pooling(self) -> Pooling: ...
    @property
    def null_token(self) -> bool: ...
    @property
    def dropped_caption(self) -> DroppedCaption: ...
    @property
    def learned_fourier_frequencies(self) -> int | None: ...
    @property
    def low_res_noise(self) -> bool: ...
    @property
    def num_classes(self) -> int | None: ...


class Inputs(nn.Module):
    """Noise level, caption, class and low-resolution noise level -> `Context`."""

    def __init__(self, config: InputConfig, embed_dim: int, cond_dim: int, *, attends_to_text: bool):
        super().__init__()
        time_dim = 4 * embed_dim
        frequencies = config.learned_fourier_frequencies

        def time_mlp() -> NoiseEmbedding:
            embedding = SinusoidalEmbedding(embed_dim) if frequencies is None else LearnedFourierEmbedding(frequencies)
            return NoiseEmbedding(embedding, time_dim)

        self.time = time_mlp()
        self.low_res_time = time_mlp() if config.low_res_noise else None
        self.text = (
            None
            if config.text_dim is None
            else TextConditioning(
                config.text_dim,
                cond_dim,
                time_dim,
                pooling=config.pooling,
                null_token=config.null_token,
                dropped_caption=config.dropped_caption,
                attended=attends_to_text,
            )
        )
        self.labels = None if config.num_classes is None else nn.Embedding(config.num_classes, time_dim)

    def forward(self, c_noise: Tensor, conditioning: Conditioning) -> Context:
        """c_noise float (b,), in float32 or better where it is a step index.

        Raises:
            ValueError: a condition the model reads is missing.
        """
        time = self.time(c_noise)
        if self.low_res_time is not None:
            if conditioning.low_res_noise is None:
                raise ValueError("conditioning.low_res_noise: this model reads the noise level of the low_res picture")
            time = time + self.low_res_time(conditioning.low_res_noise)
        if self.labels is not None:
            if conditioning.labels is None:
                raise ValueError("conditioning.labels: this model reads class labels")
            time = time + self.labels(conditioning.labels)
        if self.text is None:
            return Context(F.silu(time), None, None)
        tokens, mask, vector = self.text(conditioning)
        return Context(F.silu(time + vector), tokens, mask)


def join_low_res(x: Tensor, conditioning: Conditioning, low_res: bool) -> Tensor:
    """Concatenates the low-resolution picture to the noisy one, if the model reads it.

    Raises:
        ValueError: it is missing or of another size.
    """
    if not low_res:
        return x
    picture = conditioning.low_res
    if picture is None or picture.shape != x.shape:
        found = None if picture is None else tuple(picture.shape)
        raise ValueError(f"conditioning.low_res: this model reads a picture of {tuple(x.shape)} (got {found})")
    return torch.cat([x, picture.to(x.dtype)], dim=1)


def check_sides(x: Tensor, divisor: int) -> None:
    """Raises ValueError unless both sides of (b, c, h, w) are multiples of `divisor`."""
    if x.shape[-1] % divisor or x.shape[-2] % divisor:
        raise ValueError(f"this model needs sides that are multiples of {divisor} px (got {tuple(x.shape[-2:])})")


def run_block(block: nn.Module, x: Tensor, context: Context, *, recompute: bool) -> Tensor:
    """Calls a block; `recompute` keeps only its input for the backward pass (activation checkpointing)."""
    if recompute and torch.is_grad_enabled():
        result = checkpoint(block, x, context, use_reentrant=False)
        assert isinstance(result, Tensor)
        return result
    return block(x, context)
