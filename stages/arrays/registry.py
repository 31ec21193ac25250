"""Every stage that adds arrays, picked by `kind`."""

from typing import Annotated

from imagen_core.extensions import Kinds
from stages.arrays.base import ArrayStageConfig
from stages.arrays.clip_score import ClipScoreConfig

_ArrayStage = ClipScoreConfig  # one line for each

AnyArrayStage = Annotated[_ArrayStage, Kinds("pipeline.stages", ArrayStageConfig)]
"""What adds arrays to the store; other packages add kinds by entry points in `pipeline.stages`."""
