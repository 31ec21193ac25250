"""How the layers of a text encoder, which a store keeps apart, and the tokens of several encoders become the tokens
that a network reads."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from imagen_core.config import Config
from imagen_core.models.conditioning.base import Conditioning

TextLayerJoin = Literal["weighted_sum", "concat"]


def _from_one(value: object) -> object:
    """Raises ValueError if an entry of a list, or the value itself, is below 1, or the list is empty."""
    entries = value if isinstance(value, tuple) else (value,)
    if not entries or any(isinstance(entry, int) and entry < 1 for entry in entries):
        raise ValueError("must be 1 or more, or a list of such numbers")
    return value


TextDim = Annotated[int | tuple[int, ...] | None, AfterValidator(_from_one)]
"""Width of the embeddings of one text encoder, or those of several."""
_NumLayers = Annotated[int | tuple[int | None, ...] | None, AfterValidator(_from_one)]


class TextConfig(Config):
    """What a network reads of captions."""

    text_dim: TextDim = None
    """Width of the text embeddings, or of each of their layers; null disables conditioning on text. A list: the widths
    of several encoders, whose tokens are projected to the largest of them and joined to one sequence."""
    num_text_layers: _NumLayers = None
    """Number of layers of embeddings whose layers are stored apart (an encoder's `join: stack`); null: they have
    none. Of several encoders a list, or null."""
    text_layer_join: TextLayerJoin = "weighted_sum"
    """How these layers become one: weighted_sum, by a softmax over one learned weight per layer, which starts as their
    mean (Peters et al. 2018, arXiv 1802.05365, without scale); concat, side by side, so that the network's own
    projection has weights for each of them."""

    @property
    def text_shapes(self) -> tuple[tuple[int, ...], ...]:
        """What a token of each encoder is: (text_dim,), or (num_text_layers, text_dim); none without text."""
        each = zip(self._text_dims, self.text_layer_counts, strict=True)
        return tuple((dim,) if count is None else (count, dim) for dim, count in each)

    @property
    def text_layer_counts(self) -> tuple[int | None, ...]:
        """The number of layers of each encoder; None for one without."""
        if isinstance(self.num_text_layers, tuple):
            return self.num_text_layers
        return (self.num_text_layers,) * len(self._text_dims)

    def with_layer_count(self, number: int, count: int | None) -> str:
        """`num_text_layers` with another number for one encoder, as YAML."""
        counts = [count if place == number else before for place, before in enumerate(self.text_layer_counts)]
        shown = ["null" if each is None else str(each) for each in counts]
        return f"[{','.join(shown)}]" if isinstance(self.text_dim, tuple) else shown[0]

    @property
    def text_width(self) -> int | None:
        """Width of a token once its layers are one, and the encoders are joined; None without text."""
        if isinstance(self.text_dim, tuple):
            return max(self.text_dim)
        return None if self.text_dim is None else self._joined_widths[0]

    @property
    def _text_dims(self) -> tuple[int, ...]:
        if isinstance(self.text_dim, tuple):
            return self.text_dim
        return () if self.text_dim is None else (self.text_dim,)

    @property
    def _joined_widths(self) -> list[int]:
        """Width of a token of each encoder once its layers are one."""
        each = zip(self._text_dims, self.text_layer_counts, strict=True)
        return [dim * (count or 1) if self.text_layer_join == "concat" else dim for dim, count in each]

    def check_text_layers(self) -> None:
        """Raises ValueError if layers are set without text, for another number of encoders, or their join without
        layers."""
        layers, dim = self.num_text_layers, self.text_dim
        if layers is not None and dim is None:
            raise ValueError(f"num_text_layers is {layers}, but text_dim is null; set both, or null both")
        if layers is not None and len(layers if isinstance(layers, tuple) else ()) != len(
            dim if isinstance(dim, tuple) else ()
        ):
            raise ValueError(
                f"num_text_layers is {_plain(layers)}, but text_dim is {_plain(dim)}; of several encoders give both "
                "as lists of the same length (null for an encoder without layers)"
            )
        if self.text_layer_join == "concat" and not any(self.text_layer_counts):
            raise ValueError(
                "text_layer_join is 'concat', but num_text_layers is null, so there are no layers to join; set "
                "num_text_layers, or leave text_layer_join out"
            )

    def build_text_layers(self) -> "TextLayers | TextEncoders | None":
        """What joins the layers, or the encoders with their layers; None for one encoder without layers."""
        join = self.text_layer_join
        each = [None if count is None else TextLayers(count, join) for count in self.text_layer_counts]
        if isinstance(self.text_dim, tuple):
            return TextEncoders(self._joined_widths, each, max(self.text_dim))
        return each[0] if each else None


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


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
        if isinstance(text, tuple):
            raise ValueError("conditioning.text: this model reads one text encoder (got several); give one tensor")
        return replace(conditioning, text=self.join(text))

    def join(self, text: Tensor) -> Tensor:
        """(b, l, layers, dim) -> (b, l, dim), or (b, l, layers x dim).

        Raises:
            ValueError: the text has another number of layers.
        """
        if text.ndim != 4 or text.shape[2] != self.num_layers:
            raise ValueError(
                f"conditioning.text: this model reads (captions, tokens, {self.num_layers} layers, width) "
                f"(got {tuple(text.shape)})"
            )
        if self.weights is None:
            return text.flatten(2)
        return torch.einsum("blnx,n->blx", text.to(self.weights.dtype), self.weights.softmax(dim=0))


class TextEncoders(nn.Module):
    """Joins the tokens of several text encoders to one sequence, encoder after encoder.

    Each encoder has a norm and a linear layer of its own, whose bias tells its tokens from those of the others. In
    the sequence of a caption its real tokens come first and then all padding, so that the place of a token does not
    depend on the other captions of a batch.
    """

    def __init__(self, widths: Sequence[int], layers: Sequence[TextLayers | None], out_width: int):
        """
        Args:
            widths: of the tokens of each encoder, once their layers are one.
            layers: joins them, of each encoder that has some.
        """
        super().__init__()
        self.widths = tuple(widths)
        self.layers = nn.ModuleDict({str(n): each for n, each in enumerate(layers) if each is not None})
        self.projections = nn.ModuleList([_Projection(width, out_width) for width in widths])

    def forward(self, conditioning: Conditioning) -> Conditioning:
        """Text of each encoder, (b, l_i, width_i) or (b, l_i, layers_i, dim_i), and its mask -> text
        (b, sum of l_i, out_width) and its mask; no text stays none.

        Raises:
            ValueError: the text is not of as many encoders, or of other widths.
        """
        text, mask = conditioning.text, conditioning.text_mask
        if text is None:
            return conditioning
        count = len(self.widths)
        if not isinstance(text, tuple) or len(text) != count:
            found = len(text) if isinstance(text, tuple) else "one tensor"
            raise ValueError(f"conditioning.text: this model reads {count} text encoders (got {found}); give a tuple")
        if mask is not None and (not isinstance(mask, tuple) or len(mask) != count):
            raise ValueError(f"conditioning.text_mask: give a mask of each of the {count} text encoders, or None")
        joined = torch.cat([self._project(number, each) for number, each in enumerate(text)], dim=1)
        if mask is None:
            return replace(conditioning, text=joined, text_mask=None)
        real = torch.cat(mask, dim=1)
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
        joined = joined.gather(1, order[..., None].expand_as(joined))
        return replace(conditioning, text=joined, text_mask=real.gather(1, order))

    def _project(self, number: int, text: Tensor) -> Tensor:
        if str(number) in self.layers:
            layers = self.layers[str(number)]
            assert isinstance(layers, TextLayers)
            text = layers.join(text)
        if text.ndim != 3 or text.shape[-1] != self.widths[number]:
            raise ValueError(
                f"conditioning.text: this model reads (captions, tokens, {self.widths[number]}) of encoder {number} "
                f"(got {tuple(text.shape)})"
            )
        return self.projections[number](text)


class _Projection(nn.Module):
    """Norm and linear layer, for embeddings of any scale."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, out_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, width) -> (b, l, out_width), in the dtype of the weights."""
        return self.linear(self.norm(tokens.to(self.linear.weight.dtype)))
