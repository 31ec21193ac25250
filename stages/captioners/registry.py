"""Every captioner, picked by `kind`."""

from typing import Annotated

from imagen_core.extensions import Kinds
from stages.captioners.base import CaptionerConfig
from stages.captioners.openai import OpenaiCaptionerConfig

_Captioner = OpenaiCaptionerConfig  # one line for each

AnyCaptioner = Annotated[_Captioner, Kinds("pipeline.captioners", CaptionerConfig)]
"""What makes a set of captions; other packages add kinds by entry points in `pipeline.captioners`."""
