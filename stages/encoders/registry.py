"""The registry of encoders, picked by `kind`."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from stages.encoders.auto import AutoEncoderConfig
from stages.encoders.clip import ClipTextConfig
from stages.encoders.clip_image import ClipImageConfig
from stages.encoders.given import PrecomputedEmbeddingsConfig
from stages.encoders.t5 import T5EncoderConfig


def _by_default(kind: str) -> BeforeValidator:
    return BeforeValidator(lambda value: {"kind": kind, **value} if isinstance(value, dict) else value)


AnyEncoder = Annotated[
    T5EncoderConfig | ClipTextConfig | AutoEncoderConfig, Field(discriminator="kind"), _by_default("t5")
]
"""A model that encodes text."""

AnyTextEmbedding = Annotated[
    T5EncoderConfig | ClipTextConfig | AutoEncoderConfig | PrecomputedEmbeddingsConfig,
    Field(discriminator="kind"),
    _by_default("t5"),
]
"""Where embeddings of captions come from."""

AnyImageEmbedding = Annotated[
    ClipImageConfig | PrecomputedEmbeddingsConfig, Field(discriminator="kind"), _by_default("clip")
]
"""Where embeddings of images come from."""
