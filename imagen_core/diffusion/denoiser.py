"""The interface of all models that are trained and sampled: D(x, sigma, conditioning)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from imagen_core.diffusion.config import DenoiserConfig, PriorConfig
from imagen_core.diffusion.low_res import add_low_res_noise, upsample
from imagen_core.diffusion.precondition import Coefficients
from imagen_core.diffusion.schedules import sampling_range
from imagen_core.diffusion.variance import is_learned
from imagen_core.models import Conditioning


class Denoiser(nn.Module):
    """Estimates the clean image from a noisy one: D(x, sigma) = c_skip x + c_out F(c_in x, c_noise).

    With a `PriorConfig` x and x0 are image embeddings: their shape is (b, dim) wherever this file says (b, c, h, w).
    """

    def __init__(self, config: DenoiserConfig | PriorConfig):
        super().__init__()
        self.config = config
        self.net: nn.Module = config.network.build()

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Estimate x0.

        Args:
            x: (b, c, h, w), x0 + sigma * n with x0 in [-1, 1].
            sigma: (b,), noise levels > 0.
        Returns:
            (b, c, h, w), about in [-1, 1], in the dtype of x.
        """
        return self.with_variance(x, sigma, conditioning)[0]

    def with_variance(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
        """The estimate of x0, and the channels for `variance.log_variance` (None if the variance is fixed).

        Both (b, c, h, w) in the dtype of x; arguments as in `forward`.
        """
        c = self.coefficients(sigma.to(x.dtype))
        predicted, channels = self.network(x, sigma, conditioning)
        return column(c.skip, x) * x + column(c.out, x) * predicted, channels

    def network(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
        """The network's output: F(c_in x, c_noise), and the channels of a learned variance, else None.

        Both (b, c, h, w) in the dtype of x; arguments as in `forward`.
        """
        scaled = column(self.coefficients(sigma.to(x.dtype)).input, x) * x
        c_noise = self.config.diffusion.schedule.c_noise(sigma.double())
        output = self.net(scaled, c_noise.to(x.dtype), conditioning).to(x.dtype)
        if isinstance(self.config, PriorConfig) and self.config.clamp_prediction:
            output = self.config.to_length(output)
        channels = output[:, x.shape[1] :] if is_learned(self.config.diffusion.variance) else None
        return output[:, : x.shape[1]], channels

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """c_skip, c_out and c_in at sigma > 0, in its shape and dtype."""
        return self.config.diffusion.coefficients(sigma)

    def with_low_res(self, conditioning: Conditioning, low_res: Tensor, sigma: Tensor, noise: Tensor) -> Conditioning:
        """Adds the low-resolution image of a super-resolution stage.

        Args:
            low_res: (b, c, h, w) in [-1, 1], of any size; upsampled to the size of `noise`. With
                low_res_noise_at=low_res_px it must not be larger, and its noise is the top left corner of `noise`.
            sigma: (b,), noise level of the noise added to it; 0 adds none.
            noise: (b, c, H, W), standard normal, of the size of x.
        """
        assert isinstance(self.config, DenoiserConfig)
        shape, mode = (noise.shape[-2], noise.shape[-1]), self.config.low_res_upsampling
        if self.config.low_res_noise is None:
            return replace(conditioning, low_res=upsample(low_res, shape, mode))
        sigma = sigma.to(noise.dtype)
        scale = self.coefficients(sigma).input
        if self.config.low_res_scale == "variance_preserving":
            scale = (1 + sigma**2).rsqrt()
        if self.config.low_res_noise_at == "low_res_px":
            part = noise[..., : low_res.shape[-2], : low_res.shape[-1]]
            noised = upsample(add_low_res_noise(low_res, sigma, part, scale), shape, mode)
        else:
            noised = add_low_res_noise(upsample(low_res, shape, mode), sigma, noise, scale)
        if not self.config.unet.low_res_noise:
            return replace(conditioning, low_res=noised)
        schedule = self.config.low_res_noise.schedule
        c_noise = schedule.c_noise(sigma.double().clamp(min=sampling_range(schedule)[0]))  # ln 0 is infinite
        return replace(conditioning, low_res=noised, low_res_noise=c_noise.to(noise.dtype))

    def with_sampling_low_res(
        self, conditioning: Conditioning, low_res: Tensor, noise: Tensor, sigma: float | None = None
    ) -> Conditioning:
        """`with_low_res` at the noise level of sampling, or at `sigma`."""
        assert isinstance(self.config, DenoiserConfig)
        if sigma is None:
            sigma = 0.0 if self.config.low_res_noise is None else self.config.low_res_noise.sampling_sigma
        levels = torch.full((len(low_res),), sigma, dtype=torch.float64, device=low_res.device)
        return self.with_low_res(conditioning, low_res, levels, noise)


def column(values: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b, 1, ...), with as many axes as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
