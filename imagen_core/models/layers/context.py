"""The sequence that attention layers read beside the image."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Context:
    """What every block of a UNet is told.

    Attributes:
        time: (b, time_dim), the noise level with pooled text and labels, after its SiLU.
        tokens: (b, l, cond_dim) for attention, and mask bool (b, l); None without conditions, and mask also if all
            tokens are real.
        characters: (b, m, dim), what the transcription's encoder makes of each character, and characters_mask bool
            (b, m); None for models that read none.
    """

    time: Tensor
    tokens: Tensor | None
    mask: Tensor | None
    characters: Tensor | None = None
    characters_mask: Tensor | None = None
