"""Any UNet's configuration, and the presets' short form."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from imagen_core.models.efficient import EfficientUNetConfig
from imagen_core.models.hybrid_config import HybridUNetConfig
from imagen_core.models.presets import PRESETS
from imagen_core.models.regular import RegularUNetConfig


def _expand_preset(value: Any) -> Any:
    """`{preset: 500m_res_64, dropout: 0.1}` -> the whole configuration, with the changes."""
    if not isinstance(value, dict) or "preset" not in value:
        return value
    changes = dict(value)
    name = changes.pop("preset")
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}: there is none of this name; choose from {', '.join(PRESETS)}")
    return PRESETS[name].config.model_dump() | changes


UNetConfig = Annotated[
    Annotated[RegularUNetConfig | EfficientUNetConfig | HybridUNetConfig, Field(discriminator="family")],
    BeforeValidator(_expand_preset),
]
"""A UNet of any family, or `{preset: NAME}` with changes."""
