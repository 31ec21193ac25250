"""The loss of training, as one module that processes can share."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from imagen_core.diffusion import Denoiser, diffusion_loss
from imagen_core.diffusion.self_conditioning import with_own_estimate
from imagen_core.train.alignment.projection import Alignment
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.example import Example
from imagen_core.train.parallel.precision import autocast_dtype


class Losses(NamedTuple):
    """Of each image of an example.

    Attributes:
        diffusion: (b,).
        alignment: (b,), mean cosine of its patches to the encoder's features; zeros in steps that are not aligned,
            None without gradients and in trainings without alignment.
    """

    diffusion: Tensor
    alignment: Tensor | None = None


class TrainingLoss(nn.Module):
    """The loss of each image of an example, under the run's precision; DDP and FSDP wrap it."""

    def __init__(self, denoiser: Denoiser, config: TrainConfig, device_type: str, alignment: Alignment | None = None):
        super().__init__()
        self.denoiser, self.alignment = denoiser, alignment
        self._autocast = autocast_dtype(config.precision)
        self._device_type = device_type

    def forward(self, example: Example) -> Losses:
        """The losses of each image."""
        with torch.autocast(self._device_type, self._autocast, enabled=self._autocast is not None):
            conditioning = example.conditioning
            if example.shown_estimate is not None:
                conditioning = with_own_estimate(
                    self.denoiser, example.x0, example.sigma, example.noise, conditioning, example.shown_estimate
                )
            losses = diffusion_loss(self.denoiser, example.x0, example.sigma, example.noise, conditioning)
            if self.alignment is None or not torch.is_grad_enabled():
                return Losses(losses)
            shape = (example.x0.shape[-2], example.x0.shape[-1])
            return Losses(losses, self.alignment(shape, example.features))
