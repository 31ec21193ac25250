"""Any network's configuration, and the presets' short form."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from imagen_core.models.hybrid.unet import HybridUNetConfig
from imagen_core.models.presets.base import Preset
from imagen_core.models.presets.priors import PRIOR_PRESETS, PriorPreset
from imagen_core.models.presets.unets import PRESETS
from imagen_core.models.prior import PriorNetworkConfig
from imagen_core.models.transformer.model import TransformerConfig
from imagen_core.models.unet.efficient import EfficientUNetConfig
from imagen_core.models.unet.regular import RegularUNetConfig


def _expand(presets: Mapping[str, Preset | PriorPreset]) -> BeforeValidator:
    """`{preset: 500m_res_64, dropout: 0.1}` -> the preset's complete configuration with these changes."""

    def expand(value: Any) -> Any:
        if not isinstance(value, dict) or "preset" not in value:
            return value
        changes = dict(value)
        name = changes.pop("preset")
        if name not in presets:
            raise ValueError(f"preset {name!r}: there is none of this name; choose from {', '.join(presets)}")
        return presets[name].config.model_dump() | changes

    return BeforeValidator(expand)


UNetConfig = Annotated[
    Annotated[
        RegularUNetConfig | EfficientUNetConfig | HybridUNetConfig | TransformerConfig, Field(discriminator="family")
    ],
    _expand(PRESETS),
]
"""A UNet of any family, or a patch transformer, or `{preset: NAME}` with changes."""

AnyPriorNetworkConfig = Annotated[PriorNetworkConfig, _expand(PRIOR_PRESETS)]
"""The transformer of a prior, or `{preset: NAME}` with changes."""
