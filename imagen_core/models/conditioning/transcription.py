"""Encodes the text to be written in an image, character by character.

A small transformer that is trained with the UNet, as in nostalgebraist/improved-diffusion; pixels attend to its output
for each character (`transcription_attention`). The time vector is added to the characters, and nothing of them to the
time vector.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from imagen_core.config import Config
from imagen_core.models.conditioning.base import Conditioning, keep_mask
from imagen_core.models.conditioning.characters import NUM_IDS
from imagen_core.models.layers.positions import RelativePositionBias, Rotary
from imagen_core.models.layers.transformer import TransformerLayer

_NEWLINE = ord("\n") + 1
_MAX_LINES = 32
_ROTARY_WIDTH = 32


class TranscriptionConfig(Config):
    """An encoder of characters, and the attention of pixels to them."""

    dim: int = Field(default=512, ge=1)
    """Width of a character's vector."""
    depth: int = Field(default=4, ge=1)
    """Transformer layers of the encoder."""
    head_dim: int = Field(default=64, ge=2)
    """Width of an attention head, of the encoder and of the pixels' attention; there are dim / head_dim heads."""
    ff_mult: int = Field(default=3, ge=1)
    """Width of the gated feed-forward layers, in units of dim."""
    positions: Literal["relative", "rotary"] = "relative"
    """Positions in the encoder's attention, in addition to a learned vector for each place: T5's bias, or rotary."""
    line_embeddings: bool = True
    """A learned vector for each line is added to its characters."""
    max_characters: int = Field(default=384, ge=1)
    """Longest transcription, in bytes of UTF-8. Training truncates longer ones, sampling refuses them."""
    resolutions: tuple[int, ...] = Field(default=(8, 16), min_length=1)
    """Sides in pixels at which blocks attend to the characters, after their other attention."""
    up_only: bool = False
    """Attend on the way up only."""
    weave: bool = False
    """Before pixels attend to characters, characters attend to pixels, and pass a feed-forward layer."""
    gain: float = 0.0
    """Initial value of a learned factor on the attention's output; with 0 (ReZero, Bachlechner et al. 2020, arXiv
    2003.04887) a new model adds nothing."""
    gain_per_channel: bool = False
    """One factor per channel; with a small gain this is LayerScale (Touvron et al. 2021, arXiv 2103.17239)."""
    gain_speed: float = Field(default=1.0, gt=0)
    """How many times faster the factor changes than the learning rate alone would make it."""

    @model_validator(mode="after")
    def _check(self) -> "TranscriptionConfig":
        if self.dim % self.head_dim:
            raise ValueError(f"dim {self.dim} must be a multiple of head_dim {self.head_dim}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (got {self.head_dim})")
        return self

    @property
    def num_heads(self) -> int:
        """Attention heads of the encoder and of the pixels' attention."""
        return self.dim // self.head_dim


class TranscriptionEncoder(nn.Module):
    """Character ids -> vectors (b, l, dim), each in the context of the others and of the noise level."""

    def __init__(self, config: TranscriptionConfig, time_dim: int):
        super().__init__()
        self.config = config
        self.characters = nn.Embedding(NUM_IDS, config.dim)
        self.places = nn.Embedding(config.max_characters, config.dim)
        self.lines = nn.Embedding(_MAX_LINES, config.dim) if config.line_embeddings else None
        self.time = nn.Linear(time_dim, config.dim)
        relative = config.positions == "relative"
        self.bias = RelativePositionBias(config.num_heads, bidirectional=True) if relative else None
        self.rotary = None if relative else Rotary(min(config.head_dim, _ROTARY_WIDTH))
        self.layers = nn.ModuleList(
            TransformerLayer(
                config.dim,
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                num_kv_heads=config.num_heads,
                ff_mult=config.ff_mult,
                activation="geglu",
                ff_norm=False,
            )
            for _ in range(config.depth)
        )

    def forward(self, conditioning: Conditioning, time: Tensor) -> tuple[Tensor, Tensor]:
        """`time` (b, time_dim) -> vectors (b, l, dim), and a bool mask (b, l), false in all of a dropped row.

        Raises:
            ValueError: the ids are missing, or more than the model reads.
        """
        ids = checked_characters(conditioning, self.config.max_characters)
        mask = ids != 0
        vectors = self.characters(ids) + self.places.weight[: ids.shape[1]] + self.time(time)[:, None]
        if self.lines is not None:
            number = (ids == _NEWLINE).cumsum(dim=1).clamp(max=_MAX_LINES - 1)
            vectors = vectors + self.lines(number)
        logits = torch.zeros_like(mask, dtype=vectors.dtype).masked_fill(~mask, -torch.inf)[:, None, None]
        if self.bias is not None:
            logits = logits + self.bias(ids.shape[1])  # (b, heads, l, l)
        for layer in self.layers:
            vectors = layer(vectors, bias=logits, rotary=self.rotary)
        return vectors, mask


def checked_characters(conditioning: Conditioning, limit: int) -> Tensor:
    """Character ids, int64 (b, l), zero in dropped rows.

    Raises:
        ValueError: the ids are missing, or more than `limit` per row.
    """
    ids = conditioning.characters
    if ids is None:
        raise ValueError("conditioning.characters: this model reads transcriptions; give ids (for none, zeros)")
    if ids.shape[1] > limit:
        raise ValueError(
            f"conditioning.characters: this model reads at most {limit} bytes per transcription (got {ids.shape[1]})"
        )
    return ids.masked_fill(~keep_mask(conditioning.characters_keep, ids)[:, None], 0)
