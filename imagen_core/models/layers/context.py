"""What the blocks of a UNet read in addition to the image."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Context:
    """The conditions, as every block of a UNet receives them.

    Attributes:
        time: (b, time_dim), the noise level with pooled text and labels, after its activation.
        tokens: (b, l, cond_dim), the conditions to attend to; None without conditions.
        mask: bool (b, l), true on real tokens; None if all tokens are real.
        characters: (b, m, dim), the transcription's encoded characters; None for models that read none.
        characters_mask: bool (b, m), true on real characters; None for models that read none.
    """

    time: Tensor
    tokens: Tensor | None
    mask: Tensor | None
    characters: Tensor | None = None
    characters_mask: Tensor | None = None
