"""The kinds of feature models.

TorchScript archives, in which some feature networks are published, are none of them: loading one runs code from the
file.
"""

from stages.features.clip import ClipFeatures

AnyFeatures = ClipFeatures
