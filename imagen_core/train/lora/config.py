"""Settings of an adapter, in training and in sampling."""

from typing import Annotated

from pydantic import Field, model_validator

from imagen_core.config import Config


class LoraConfig(Config):
    """LoRA (Hu et al. 2021, arXiv 2106.09685): a layer of weights W computes with W + (alpha / rank) B A, of which A
    and B alone are trained."""

    rank: int = Field(default=16, ge=1)
    """Rows of A, and columns of B."""
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Scale of B A, times rank; null: rank, which is a scale of 1."""
    targets: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """Ends of the names of linear layers and convolutions that get A and B, such as `to_q` or `conv1`; null: all
    projections of attention."""

    @model_validator(mode="after")
    def _check(self) -> "LoraConfig":
        if self.targets == ():
            raise ValueError("targets: is empty, so nothing would be trained; name layers, or null for attention")
        return self

    @property
    def scale_times_rank(self) -> float:
        """alpha, which is rank where it is null."""
        return float(self.rank if self.alpha is None else self.alpha)


class LoraUseConfig(Config):
    """How the adapter of a checkpoint is added to its base."""

    scale: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of what the adapter adds to the base; 0: the base alone."""
    merge: bool = True
    """Add the adapter to the base's weights, so that the network is as fast as the base; false: compute both apart."""
    base: str | None = Field(default=None, min_length=1)
    """Where the base is that the adapter was trained on, if it was moved; null: where it was."""
