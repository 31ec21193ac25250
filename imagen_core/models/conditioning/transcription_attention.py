"""Attention of pixels to the characters of a transcription, and of characters to pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.conditioning.transcription import TranscriptionConfig
from imagen_core.models.layers.attention import Attention, flatten_pixels, unflatten_pixels
from imagen_core.models.layers.context import Context
from imagen_core.models.layers.transformer import feed_forward


class TranscriptionAttention(nn.Module):
    """Pixels attend to characters, with a residual; an image without a transcription stays as it is.

    With `weave` the characters attend to the pixels first; the next block starts from the encoder's output again.
    """

    def __init__(self, config: TranscriptionConfig, width: int, side_px: int, time_dim: int):
        """`width`: channels; `side_px`: side at the model's image size. Positions are interpolated to other sides."""
        super().__init__()
        self.weave = CharactersAttention(config, width, side_px, time_dim) if config.weave else None
        self.norm = PlacedNorm(width, side_px, time_dim)
        self.norm_characters = nn.LayerNorm(config.dim)
        self.attention = _cross_attention(config, width, config.dim)
        self.gain = Gain(config, width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        characters, mask = context.characters, context.characters_mask
        assert characters is not None
        assert mask is not None
        if self.weave is not None:
            characters = self.weave(characters, x, context.time)
        pixels = flatten_pixels(self.norm(x, context.time))
        attended = self.attention(pixels, self.norm_characters(characters), mask)
        return x + unflatten_pixels(self.gain(attended), x)


class CharactersAttention(nn.Module):
    """Characters attend to pixels, then pass a feed-forward layer; both with residuals."""

    def __init__(self, config: TranscriptionConfig, width: int, side_px: int, time_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.norm_pixels = PlacedNorm(width, side_px, time_dim)
        self.attention = _cross_attention(config, config.dim, width)
        self.gain = Gain(config, config.dim)
        self.feed_forward = feed_forward(config.dim, config.ff_mult, "geglu", inner_norm=False)
        self.feed_forward_gain = Gain(config, config.dim)

    def forward(self, characters: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """characters (b, l, dim), image (b, c, h, w), time (b, time_dim) -> characters."""
        attended = self.attention(self.norm(characters), flatten_pixels(self.norm_pixels(x, time)))
        characters = characters + self.gain(attended)
        return characters + self.feed_forward_gain(self.feed_forward(characters))


class PlacedNorm(nn.Module):
    """A norm that is scaled and shifted by the time vector and by each pixel's position, row plus column."""

    def __init__(self, width: int, side_px: int, time_dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.time = nn.Linear(time_dim, 2 * width)
        self.rows = nn.Parameter(torch.randn(2 * width, side_px) / 2)
        self.columns = nn.Parameter(torch.randn(2 * width, side_px) / 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(b, c, h, w) and the time vector (b, time_dim) -> (b, c, h, w)."""
        rows, columns = _interpolate(self.rows, x.shape[2]), _interpolate(self.columns, x.shape[3])
        places = rows[:, :, None] + columns[:, None, :]
        scale, shift = (self.time(time)[:, :, None, None] + places).chunk(2, dim=1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class Gain(nn.Module):
    """A learned factor: a single one, or one per channel."""

    def __init__(self, config: TranscriptionConfig, width: int):
        super().__init__()
        self.speed = config.gain_speed
        count = width if config.gain_per_channel else 1
        self.factor = nn.Parameter(torch.full((count,), config.gain / config.gain_speed))

    def forward(self, x: Tensor) -> Tensor:
        """(..., c) -> (..., c)."""
        return x * (self.speed * self.factor)


def _cross_attention(config: TranscriptionConfig, dim: int, context_dim: int) -> Attention:
    """Orthogonal initial weights, and no biases: with nothing to attend to, it adds nothing."""
    attention = Attention(
        dim,
        kind="cross",
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        context_dim=context_dim,
        bias=False,
    )
    assert attention.context_to_kv is not None
    with torch.no_grad():
        for weight in (attention.to_q.weight, *attention.context_to_kv.weight.chunk(2), attention.to_out.weight):
            nn.init.orthogonal_(weight)
    return attention


def _interpolate(places: Tensor, side: int) -> Tensor:
    """(c, side_px) -> (c, side), linearly."""
    if places.shape[1] == side:
        return places
    return F.interpolate(places[None], size=side, mode="linear", align_corners=False)[0]
