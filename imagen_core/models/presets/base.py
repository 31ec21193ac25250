"""What a preset is."""

from dataclasses import dataclass

from imagen_core.models.hybrid.unet import HybridUNetConfig
from imagen_core.models.unet.efficient import EfficientUNetConfig
from imagen_core.models.unet.regular import RegularUNetConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """A configuration and what it builds."""

    config: RegularUNetConfig | EfficientUNetConfig | HybridUNetConfig
    parameters: int
    """Exact; a test builds the model and counts."""
    source: str
    """Where the configuration is from, and what it is called there."""
