"""Settings of representation alignment."""

from typing import Annotated, Literal

from pydantic import Field

from imagen_core.config import Config


class AlignmentConfig(Config):
    """Representation alignment (REPA, Yu et al. 2024, arXiv 2410.06940), with features that precompute stored."""

    encoder: str = Field(min_length=1)
    """Image encoder with output=patches whose features the store has."""
    weight: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Factor of the alignment in the loss: it is minus this times the mean cosine of the patches."""
    block: Annotated[int, Field(ge=1)] | str
    """Whose output is aligned: of a patch transformer the number of a block, from 1; of a UNet the name of a block,
    such as `middle.0`."""
    projection: Literal["mlp", "conv"] = "mlp"
    """From hidden states to features: mlp, three linear layers with SiLU between them (REPA); conv, one convolution of
    3 x 3 patches (iREPA, Singh et al. 2025, arXiv 2512.10794)."""
    hidden_dim: int = Field(default=2048, ge=1)
    """Width of the hidden layers of projection=mlp."""
    spatial_norm: float | None = Field(default=None, ge=0, le=1)
    """Normalise each channel of an image's features over its patches, after this part of its mean is subtracted, so
    that what patches have in common counts less (iREPA); null: features as they are stored."""
    until_step: int | None = Field(default=None, ge=1)
    """Align in this many first steps only; null: in all. Long alignment may hold back a model of pixels."""

    def acts(self, step: int) -> bool:
        """Whether step 0, 1, 2 ... is aligned."""
        return self.until_step is None or step < self.until_step
