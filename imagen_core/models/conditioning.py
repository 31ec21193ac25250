"""What a denoiser is told besides the noisy picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Row i of every tensor belongs to row i of the noisy batch; None where a model has no such input.

    Attributes:
        text: float (b, l, text_dim), zero padded token embeddings.
        text_mask: bool (b, l), true on real tokens.
        text_keep: bool (b,); a false row is unconditional (caption dropout in training, guidance in
            sampling). None keeps all.
        low_res: float (b, c, h, w), the low-resolution picture upsampled to the size of x, noised and
            scaled by `diffusion.low_res`.
        low_res_noise: float (b,), c_noise of the noise level put on low_res.
        labels: int64 (b,), class labels.
    """

    text: Tensor | None = None
    text_mask: Tensor | None = None
    text_keep: Tensor | None = None
    low_res: Tensor | None = None
    low_res_noise: Tensor | None = None
    labels: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Apply a function to every tensor."""
        return Conditioning(**{name: None if t is None else function(t) for name, t in self._items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Conditioning":
        """Move to a device; dtype, if given, is for the floating-point tensors only."""
        return self.map(lambda t: t.to(device, dtype if t.is_floating_point() else None))

    def rows(self, part: slice) -> "Conditioning":
        """Some rows of the batch."""
        return self.map(lambda t: t[part])

    def unconditional(self) -> "Conditioning":
        """The same without captions, for classifier-free guidance (Ho and Salimans 2022)."""
        if self.text is None:
            return self
        return replace(self, text_keep=torch.zeros(len(self.text), dtype=torch.bool, device=self.text.device))

    def _items(self) -> list[tuple[str, Tensor | None]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def cat(parts: Sequence[Conditioning]) -> Conditioning:
    """Join batches. A missing `text_keep` counts as all true if another part has one."""
    joined: dict[str, Tensor | None] = {}
    keeps = [part.text_keep for part in parts]
    for field in fields(Conditioning):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "text_keep" and any(keep is not None for keep in keeps):
            values = [_keep(part) for part in parts]
        present = [value for value in values if value is not None]
        if present and len(present) != len(values):
            raise ValueError(f"conditioning.{field.name}: some parts have it and some do not")
        joined[field.name] = torch.cat(present) if present else None
    return Conditioning(**joined)


def _keep(part: Conditioning) -> Tensor | None:
    if part.text_keep is not None or part.text is None:
        return part.text_keep
    return torch.ones(len(part.text), dtype=torch.bool, device=part.text.device)
