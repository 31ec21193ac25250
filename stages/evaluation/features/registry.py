"""The kinds of feature models.

TorchScript archives, in which some feature networks are published, are not supported: loading one runs code from the
file.
"""

from typing import Annotated

from pydantic import Field

from stages.evaluation.features.clip import ClipFeatures
from stages.evaluation.features.inception import InceptionFeatures

AnyFeatures = Annotated[ClipFeatures | InceptionFeatures, Field(discriminator="kind")]
