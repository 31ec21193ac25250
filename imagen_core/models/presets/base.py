"""The record of one preset."""

from dataclasses import dataclass

from imagen_core.models.hybrid.unet import HybridUNetConfig
from imagen_core.models.transformer.model import TransformerConfig
from imagen_core.models.unet.efficient import EfficientUNetConfig
from imagen_core.models.unet.regular import RegularUNetConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """A published configuration and its number of parameters."""

    config: RegularUNetConfig | EfficientUNetConfig | HybridUNetConfig | TransformerConfig
    parameters: int
    """Exact; a test builds the model and counts."""
    source: str
    """The system that published the configuration, and its name there."""
