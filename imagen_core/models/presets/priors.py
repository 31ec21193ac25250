"""Published priors, each with its exact number of parameters."""

from dataclasses import dataclass

from imagen_core.models.prior import PriorNetworkConfig


@dataclass(frozen=True, slots=True)
class PriorPreset:
    """A published configuration and its number of parameters."""

    config: PriorNetworkConfig
    parameters: int
    """Exact; a test builds the model and counts."""
    source: str
    """The system that published the configuration."""


PRIOR_PRESETS = {
    "dalle2_prior": PriorPreset(
        PriorNetworkConfig(
            dim=768, depth=12, num_heads=12, text_dim=768, max_text_tokens=77, num_timesteps=1000, ff_norm=True
        ),
        101_756_560,
        "DALLE2-pytorch example prior, CLIP ViT-L/14",
    ),
    "dalle2_prior_large": PriorPreset(
        PriorNetworkConfig(dim=768, depth=24, num_heads=32, text_dim=768, num_timesteps=1000, ff_norm=True),
        249_416_720,
        "DALLE2-pytorch, LAION's prior, CLIP ViT-L/14",
    ),
    "dalle2_prior_small": PriorPreset(
        PriorNetworkConfig(dim=512, depth=6, num_heads=8, text_dim=512),
        24_918_544,
        "DALLE2-pytorch README's prior, CLIP ViT-B/32",
    ),
}
"""Priors by name."""
