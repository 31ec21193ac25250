"""Every encoder, picked by `kind`."""

from typing import Annotated

from pydantic import BeforeValidator

from imagen_core.extensions import Kinds
from stages.encoders.auto import AutoEncoderConfig
from stages.encoders.base import EncoderConfig, ImageEncoderConfig
from stages.encoders.clip import ClipTextConfig
from stages.encoders.clip_image import ClipImageConfig
from stages.encoders.given import PrecomputedEmbeddingsConfig
from stages.encoders.patches.config import PatchEncoderConfig
from stages.encoders.recipes.shipped import with_recipe
from stages.encoders.t5 import T5EncoderConfig

_TextEncoder = (
    T5EncoderConfig  # one line for each
    | ClipTextConfig
    | AutoEncoderConfig
)
_ImageEncoder = ClipImageConfig | PatchEncoderConfig

_TEXT_KINDS = Kinds("pipeline.encoders", EncoderConfig, default="t5")
_IMAGE_KINDS = Kinds("pipeline.image_encoders", ImageEncoderConfig, default="clip")

AnyEncoder = Annotated[_TextEncoder, _TEXT_KINDS, BeforeValidator(with_recipe)]
"""A model that encodes text; other packages add kinds by entry points in `pipeline.encoders`."""

AnyTextEmbedding = Annotated[_TextEncoder | PrecomputedEmbeddingsConfig, _TEXT_KINDS, BeforeValidator(with_recipe)]
"""Where embeddings of captions come from."""

AnyImageEmbedding = Annotated[_ImageEncoder | PrecomputedEmbeddingsConfig, _IMAGE_KINDS]
"""Where embeddings of images come from; other packages add kinds by entry points in `pipeline.image_encoders`."""
