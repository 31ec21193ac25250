"""Networks for images: the noisy image, its noise level and the conditioning in, a prediction of the same size out."""

from imagen_core.models.conditioning.base import Conditioning, cat
from imagen_core.models.config import AnyPriorNetworkConfig, UNetConfig

__all__ = ["AnyPriorNetworkConfig", "Conditioning", "UNetConfig", "cat"]
