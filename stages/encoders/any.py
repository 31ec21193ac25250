"""The registry of text encoders, picked by `kind`."""

from typing import Annotated

from pydantic import Field

from stages.encoders.auto import AutoEncoderConfig
from stages.encoders.clip import ClipTextConfig
from stages.encoders.t5 import T5EncoderConfig

AnyEncoder = Annotated[T5EncoderConfig | ClipTextConfig | AutoEncoderConfig, Field(discriminator="kind")]
