"""The loss of training, as one module that processes can share."""

import torch
from torch import Tensor, nn

from imagen_core.diffusion import Denoiser, diffusion_loss
from imagen_core.diffusion.self_conditioning import with_own_estimate
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.example import Example
from imagen_core.train.parallel.precision import autocast_dtype


class TrainingLoss(nn.Module):
    """The loss of each image of an example, under the run's precision; DDP and FSDP wrap it."""

    def __init__(self, denoiser: Denoiser, config: TrainConfig, device_type: str):
        super().__init__()
        self.denoiser = denoiser
        self._autocast = autocast_dtype(config.precision)
        self._device_type = device_type

    def forward(self, example: Example) -> Tensor:
        """(b,)."""
        with torch.autocast(self._device_type, self._autocast, enabled=self._autocast is not None):
            conditioning = example.conditioning
            if example.shown_estimate is not None:
                conditioning = with_own_estimate(
                    self.denoiser, example.x0, example.sigma, example.noise, conditioning, example.shown_estimate
                )
            return diffusion_loss(self.denoiser, example.x0, example.sigma, example.noise, conditioning)
