"""The registry of text encoders, picked by `kind`."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from stages.encoders.auto import AutoEncoderConfig
from stages.encoders.clip import ClipTextConfig
from stages.encoders.t5 import T5EncoderConfig


def _t5_by_default(value: object) -> object:
    return {"kind": "t5", **value} if isinstance(value, dict) else value


AnyEncoder = Annotated[
    T5EncoderConfig | ClipTextConfig | AutoEncoderConfig,
    Field(discriminator="kind"),
    BeforeValidator(_t5_by_default),
]
