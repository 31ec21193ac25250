"""Every stage that adds arrays, picked by `kind`; all of them are of other packages."""

from typing import Annotated

from imagen_core.extensions import Kinds
from stages.arrays.base import ArrayStageConfig

AnyArrayStage = Annotated[ArrayStageConfig, Kinds("pipeline.stages", ArrayStageConfig)]
"""A stage that adds arrays to the store; other packages add kinds by entry points in `pipeline.stages`."""
