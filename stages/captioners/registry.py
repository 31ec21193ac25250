"""Every captioner, picked by `kind`."""

from typing import Annotated

from imagen_core.extensions import Kinds
from stages.captioners.base import ModelCaptionerConfig
from stages.captioners.openai import OpenaiCaptionerConfig
from stages.captioners.table import TableCaptionerConfig
from stages.captioners.transformers import TransformersCaptionerConfig

AnyCaptioner = Annotated[
    OpenaiCaptionerConfig  # one line for each
    | TransformersCaptionerConfig
    | TableCaptionerConfig,
    Kinds("pipeline.captioners", ModelCaptionerConfig),
]
"""What makes a set of captions; other packages add models by entry points in `pipeline.captioners`."""
