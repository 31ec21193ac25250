"""The conditions a denoiser receives in addition to the noisy image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")
Condition = Literal["text", "transcription", "labels", "image_embed", "low_res"]
"""A condition that guidance can drop."""

Tokens = Tensor | tuple[Tensor, ...]
"""Of one text encoder, or of each of several in their order."""

_TENSORS: dict[Condition, tuple[str, ...]] = {
    "text": ("text", "text_embed"),
    "transcription": ("characters",),
    "labels": ("labels",),
    "image_embed": ("image_embed",),
    "low_res": ("low_res",),
}
_COMPANIONS: dict[Condition, tuple[str, ...]] = {
    "text": ("text_mask", "null_text", "null_text_mask"),
    "low_res": ("low_res_noise",),
}
_KEEP = {
    "text": "text_keep",
    "transcription": "characters_keep",
    "labels": "labels_keep",
    "image_embed": "image_embed_keep",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """Row i of every tensor belongs to row i of the noisy batch; None where a model has no such input.

    A row that is false in a `keep` is unconditional in that condition (dropout in training, guidance in sampling); a
    keep of None keeps all rows.

    Attributes:
        text: float (b, l, text_dim), token embeddings padded with zeros; (b, l, layers, text_dim) where a model reads
            several layers of each token. Where it reads several encoders, such a tensor of each, with an l of its own.
        text_mask: bool (b, l), true on real tokens; of each encoder where there are several.
        text_embed: float (b, d), the caption as one vector in a space shared with images (CLIP).
        text_keep: bool (b,), of text and text_embed.
        null_text, null_text_mask: as text and text_mask, of the same length: the caption that takes the place of a
            dropped one, such as the empty or a negative one; None where the network itself knows what a dropped
            caption is.
        characters: int64 (b, l), the text to be written in the image, as `character_ids` gives it.
        characters_keep: bool (b,).
        low_res: float (b, c, h, w), the low-resolution image upsampled to the size of x, noised and
            scaled by `diffusion.low_res`.
        low_res_noise: float (b,), c_noise of the noise level put on low_res.
        labels: int64 (b,), class labels.
        labels_keep: bool (b,).
        image_embed: float (b, d), an image encoder's embedding of the image to generate.
        image_embed_keep: bool (b,).
        images: float (b, k, h, w), additional conditioning images of the size of x.
        estimate: float (b, c, h, w), an earlier estimate of the clean image (self-conditioning).
        memory: what modules made of the conditions, by module; None keeps nothing. See `remembering`.
    """

    text: Tokens | None = None
    text_mask: Tokens | None = None
    text_embed: Tensor | None = None
    text_keep: Tensor | None = None
    null_text: Tensor | None = None
    null_text_mask: Tensor | None = None
    characters: Tensor | None = None
    characters_keep: Tensor | None = None
    low_res: Tensor | None = None
    low_res_noise: Tensor | None = None
    labels: Tensor | None = None
    labels_keep: Tensor | None = None
    image_embed: Tensor | None = None
    image_embed_keep: Tensor | None = None
    images: Tensor | None = None
    estimate: Tensor | None = None
    memory: dict[nn.Module, Any] | None = None

    def remembering(self) -> "Conditioning":
        """A copy for all steps of one sampling: networks compute once what does not depend on the noise level.

        Only `estimate` may be replaced in it, and the weights may not change while it is used.
        """
        return replace(self, memory={})

    def remembered(self, module: nn.Module, compute: Callable[[], T]) -> T:
        """What `compute` returns; in a copy made by `remembering`, and without gradients, from the first call on."""
        if self.memory is None or torch.is_grad_enabled():
            return compute()
        if module not in self.memory:
            self.memory[module] = compute()
        return self.memory[module]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Applies a function to every tensor."""
        values: dict[str, Any] = {name: None if t is None else _each(function, t) for name, t in self._items()}
        return Conditioning(**values)

    def map_text(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Applies a function to token embeddings and masks of every encoder, and to those of `null_text`."""
        names = ("text", "text_mask", "null_text", "null_text_mask")
        found = {name: tokens for name in names if (tokens := getattr(self, name)) is not None}
        return replace(self, **{name: _each(function, tokens) for name, tokens in found.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Conditioning":
        """Moves all tensors to a device; `dtype` applies to floating-point tensors only, None keeps theirs."""
        return self.map(lambda t: t.to(device, dtype if t.is_floating_point() else None))

    def rows(self, part: slice) -> "Conditioning":
        """A slice of the batch."""
        return self.map(lambda t: t[part])

    def has(self, condition: Condition) -> bool:
        """Whether the batch has this condition."""
        return any(getattr(self, name) is not None for name in _TENSORS[condition])

    def with_keep(self, condition: Condition, keep: Tensor) -> "Conditioning":
        """A copy with a condition dropped in the rows where `keep`, bool (b,), is false; not for low_res."""
        if condition != "text" or self.null_text is None:
            return replace(self, **{_KEEP[condition]: keep})
        assert isinstance(self.text, Tensor)
        assert isinstance(self.text_mask, Tensor)
        assert self.null_text_mask is not None
        text = torch.where(keep.view(-1, *[1] * (self.text.ndim - 1)), self.text, self.null_text)
        return replace(self, text=text, text_mask=torch.where(keep[:, None], self.text_mask, self.null_text_mask))

    def with_null_text(self, null_text: Tensor) -> "Conditioning":
        """A copy in which a dropped caption is replaced by `null_text`, (l, text_dim) or (l, layers, text_dim).

        Raises:
            ValueError: there is no text, it is of several encoders, or captions are read as one vector too.
        """
        if not isinstance(self.text, Tensor) or self.text_embed is not None:
            raise ValueError("conditioning.null_text: is for models that read captions as tokens of one encoder alone")
        batch, length = self.text.shape[:2]
        mask = self.text_mask
        if not isinstance(mask, Tensor):
            mask = self.text.new_ones(batch, length, dtype=torch.bool)
        longest = max(length, len(null_text))
        null = _longer(null_text.to(self.text), longest, axis=0).expand(batch, *[-1] * (self.text.ndim - 1))
        null_mask = torch.arange(longest, device=mask.device) < len(null_text)
        return replace(
            self,
            text=_longer(self.text, longest, axis=1),
            text_mask=_longer(mask, longest, axis=1),
            null_text=null,
            null_text_mask=null_mask.expand(batch, -1),
        )

    def without(self, condition: Condition) -> "Conditioning":
        """A copy with a condition dropped in all rows; a low-resolution image becomes zero, which is mid-gray."""
        if not self.has(condition):
            return self
        if condition == "low_res":
            assert self.low_res is not None
            return replace(self, low_res=torch.zeros_like(self.low_res))
        return self.with_keep(condition, torch.zeros_like(self._keep_all()))

    def without_inputs(self, condition: Condition) -> "Conditioning":
        """A copy without the tensors of a condition, for a model that does not read it."""
        return replace(self, **dict.fromkeys((*_TENSORS[condition], *_COMPANIONS.get(condition, ())), None))

    def unconditional(self) -> "Conditioning":
        """A copy with all captions dropped, for classifier-free guidance (Ho and Salimans 2022)."""
        return self.without("text")

    def _items(self) -> list[tuple[str, Tokens | None]]:
        return [(name, getattr(self, name)) for name in _names()]

    def _keep_all(self) -> Tensor:
        """bool (b,), all true."""
        found = next(t for _, t in self._items() if t is not None)
        some = found[0] if isinstance(found, tuple) else found
        return torch.ones(len(some), dtype=torch.bool, device=some.device)


def _names() -> list[str]:
    return [field.name for field in fields(Conditioning) if field.name != "memory"]


def _each(function: Callable[[Tensor], Tensor], tokens: Tokens) -> Tokens:
    return tuple(map(function, tokens)) if isinstance(tokens, tuple) else function(tokens)


def _longer(values: Tensor, length: int, *, axis: int) -> Tensor:
    """Padded with zeros to `length` along an axis."""
    missing = length - values.shape[axis]
    padding = values.new_zeros(*values.shape[:axis], missing, *values.shape[axis + 1 :])
    return torch.cat([values, padding], dim=axis) if missing else values


def unit_variance(embeds: Tensor) -> Tensor:
    """(..., d) -> the same directions at length sqrt(d), so that each component has variance 1.

    Models read embeddings in this form where only the angle between two of them has a meaning, as with CLIP.
    """
    return F.normalize(embeds, dim=-1) * embeds.shape[-1] ** 0.5


def keep_mask(keep: Tensor | None, like: Tensor) -> Tensor:
    """`keep`, or all true if it is None: bool (b,), with the rows and the device of `like`."""
    return torch.ones(like.shape[0], dtype=torch.bool, device=like.device) if keep is None else keep


def cat(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenates batches. A missing keep counts as all true if another part has one.

    Raises:
        ValueError: a condition that some parts have and others lack.
    """
    joined: dict[str, Any] = {}
    for name in _names():
        values = [getattr(part, name) for part in parts]
        present = [value for value in values if value is not None]
        if present and len(present) != len(values) and name.endswith("_keep"):
            values = [part._keep_all() if value is None else value for part, value in zip(parts, values, strict=True)]
        elif present and len(present) != len(values):
            raise ValueError(f"conditioning.{name}: some parts have it and some do not")
        if present and isinstance(present[0], tuple):
            joined[name] = tuple(map(torch.cat, zip(*values, strict=True)))
        else:
            joined[name] = torch.cat(values) if present else None
    return Conditioning(**joined)
