"""How the layers of a text encoder, which a store keeps apart, become the tokens that a network reads."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from imagen_core.config import Config
from imagen_core.models.conditioning.base import Conditioning

TextLayerJoin = Literal["weighted_sum", "concat"]


class TextConfig(Config):
    """What a network reads of captions."""

    text_dim: int | None = Field(default=None, ge=1)
    """Width of the text embeddings, or of each of their layers; null disables conditioning on text."""
    num_text_layers: int | None = Field(default=None, ge=1)
    """Number of layers of embeddings whose layers are stored apart (an encoder's `join: stack`); null: they have
    none."""
    text_layer_join: TextLayerJoin = "weighted_sum"
    """How these layers become one: weighted_sum, by a softmax over one learned weight per layer, which starts as their
    mean (Peters et al. 2018, arXiv 1802.05365, without scale); concat, side by side, so that the network's own
    projection has weights for each of them."""

    @property
    def text_shape(self) -> tuple[int, ...] | None:
        """What a token is: (text_dim,), or (num_text_layers, text_dim); None without text."""
        if self.text_dim is None:
            return None
        return (self.text_dim,) if self.num_text_layers is None else (self.num_text_layers, self.text_dim)

    @property
    def text_width(self) -> int | None:
        """Width of a token once its layers are one; None without text."""
        joined = self.num_text_layers if self.text_layer_join == "concat" else None
        return None if self.text_dim is None else self.text_dim * (joined or 1)

    def check_text_layers(self) -> None:
        """Raises ValueError if layers are set without text."""
        if self.num_text_layers is not None and self.text_dim is None:
            raise ValueError(
                f"num_text_layers is {self.num_text_layers}, but text_dim is null; set both, or null both"
            )

    def build_text_layers(self) -> "TextLayers | None":
        """What joins the layers; None where the text has none."""
        return None if self.num_text_layers is None else TextLayers(self.num_text_layers, self.text_layer_join)


class TextLayers(nn.Module):
    """Joins the layers of each token."""

    def __init__(self, num_layers: int, join: TextLayerJoin):
        super().__init__()
        self.num_layers = num_layers
        self.weights = nn.Parameter(torch.zeros(num_layers)) if join == "weighted_sum" else None

    def forward(self, conditioning: Conditioning) -> Conditioning:
        """Text (b, l, layers, dim) -> (b, l, dim), or (b, l, layers x dim); no text stays none.

        Raises:
            ValueError: the text has another number of layers.
        """
        text = conditioning.text
        if text is None:
            return conditioning
        if text.ndim != 4 or text.shape[2] != self.num_layers:
            raise ValueError(
                f"conditioning.text: this model reads (captions, tokens, {self.num_layers} layers, width) "
                f"(got {tuple(text.shape)})"
            )
        return replace(conditioning, text=text.flatten(2) if self.weights is None else self._sum(text, self.weights))

    def _sum(self, text: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("blnx,n->blx", text.to(weights.dtype), weights.softmax(dim=0))
