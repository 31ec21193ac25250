"""Configuration of the diffusion process and of a denoiser."""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor

from imagen_core.config import Config, default_field
from imagen_core.diffusion.low_res import LowResNoise, Upsampling
from imagen_core.diffusion.precondition import Coefficients, Objective, coefficients
from imagen_core.diffusion.schedules import Discrete, Flow, LogNormal, NoiseSchedule
from imagen_core.diffusion.variance import Variance, is_learned
from imagen_core.models import AnyPriorNetworkConfig, UNetConfig

LossKind = Literal["l1", "l2", "huber", "kl", "rescaled_kl"]
LossSpace = Literal["output", "x0", "eps", "velocity"]
WeightKind = Literal["none", "p2", "min_snr", "snr_plus_one", "edm", "sigmoid"]


class DiffusionConfig(Config):
    """Noise levels, the network's objective, and the loss."""

    schedule: NoiseSchedule = LogNormal()
    """Noise levels of training."""
    objective: Objective = "edm"
    """What the network predicts; velocity, of a flow schedule, is what most flow matching models predict."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the images, for the edm objective."""
    variance: Variance = "fixed_small"
    """Variance of ancestral sampling's steps. The learned ones need a discrete schedule and a network with twice as
    many out_channels as in_channels."""
    loss: LossKind = "l2"
    """Distance between the network's prediction and its target; or the variational bound in bits per dimension: kl,
    the term of the sampled step; rescaled_kl, that term times the number of steps."""
    loss_space: LossSpace = default_field("output")
    """What is compared: the network's output; or the image, the noise or the velocity of a flow schedule that follow
    from it (Li and He 2025, arXiv 2511.13720: objective x0, loss_space velocity)."""
    velocity_min_t: float = default_field(0.0, ge=0, lt=1)
    """loss_space=velocity divides the image's error by t; by this where t is lower (Li and He 2025: 0.05)."""
    vb_weight: float = Field(default=0.001, ge=0)
    """Weight of the variational bound, summed over all steps, in the loss of a learned variance. It teaches the
    variance only: the gradient stops at the mean."""
    weight: WeightKind = "none"
    """Weight by noise level; none weights what is compared equally everywhere (for edm, the paper's weight)."""
    p2_k: float = Field(default=1.0, gt=0)
    """k of the p2 weight."""
    p2_gamma: float = Field(default=0.5, ge=0, le=2)
    """gamma of the p2 weight; larger puts less weight on low noise. Above 2 training is known to fail."""
    min_snr_gamma: float = Field(default=5.0, gt=0)
    """gamma of the min-SNR weight."""
    sigmoid_bias: float = default_field(0.0)
    """Bias of the sigmoid weight, a log-SNR; lower puts more weight on high noise."""

    @model_validator(mode="after")
    def _check(self) -> "DiffusionConfig":
        bound = self.loss in ("kl", "rescaled_kl")
        for name, value, needs in (
            ("objective", self.objective, self.objective == "prev"),
            ("variance", self.variance, is_learned(self.variance)),
            ("loss", self.loss, bound),
        ):
            if needs and not isinstance(self.schedule, Discrete):
                raise ValueError(f"{name}={value} needs a discrete schedule (got {self.schedule.kind})")
        self._check_flow()
        if bound and self.loss_space != "output":
            raise ValueError(f"loss={self.loss} has no loss_space (got {self.loss_space}); use loss_space=output")
        if bound and self.weight != "none":
            raise ValueError(f"loss={self.loss} has no weight by noise level (got {self.weight}); use weight=none")
        return self

    def _check_flow(self) -> None:
        """Refuses what only a flow schedule has, and what it has not."""
        if self.flow is None:
            for name, value in (("objective", self.objective), ("loss_space", self.loss_space)):
                if value == "velocity":
                    raise ValueError(f"{name}=velocity needs schedule.kind=flow (got {self.schedule.kind})")
        elif self.objective == "v":
            raise ValueError("objective=v is DDPM's; with schedule.kind=flow take objective=velocity")
        if self.velocity_min_t and self.loss_space != "velocity":
            raise ValueError(f"velocity_min_t is for loss_space=velocity (got loss_space={self.loss_space})")

    @property
    def flow(self) -> Flow | None:
        """The schedule, if it is that of flow matching."""
        return self.schedule if isinstance(self.schedule, Flow) else None

    def loss_divisor(self, sigma: Tensor) -> Tensor:
        """What the image's error is divided by to be the error that the loss compares, in shape and dtype of sigma."""
        if self.loss_space == "x0":
            return torch.ones_like(sigma)
        if self.loss_space == "eps":
            return sigma
        if self.loss_space == "velocity" and self.flow is not None:
            return self.flow.t(sigma).clamp(min=self.velocity_min_t)
        return self.coefficients(sigma).out

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """c_skip, c_out and c_in at noise levels sigma > 0, in their shape and dtype."""
        previous = None
        if self.objective == "prev" and isinstance(self.schedule, Discrete):
            previous = self.schedule.previous(sigma).to(sigma.dtype)
        scale = None if self.flow is None else self.flow.noise_scale
        return coefficients(self.objective, sigma, self.sigma_data, previous, scale)

    def check_step(self, sigma: Tensor, sigma_next: Tensor) -> None:
        """Refuses a step, between two scalar levels, whose variance was not learned.

        Raises:
            ValueError: variance=learned, and the step is not one of the schedule's own, which alone were learned.
        """
        if self.variance != "learned" or not isinstance(self.schedule, Discrete):
            return
        levels = torch.cat([torch.zeros(1, dtype=torch.float64), self.schedule.sigmas()])
        found = [int((levels - float(level)).abs().argmin()) for level in (sigma, sigma_next)]
        if found[0] != found[1] + 1:
            raise ValueError(
                f"variance=learned covers the {self.schedule.num_steps} steps of the schedule, and sigma "
                f"{float(sigma):.4g} to {float(sigma_next):.4g} is none of them; use grid.kind=uniform with num_steps="
                f"{self.schedule.num_steps}, a sampler without noise, or a model with learned_range"
            )


class DenoiserConfig(Config):
    """One stage of a cascade: a UNet and the diffusion it is trained with."""

    kind: Literal["images"] = "images"
    unet: UNetConfig
    """The network; `{preset: NAME}` selects a published one."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""
    size_px: int = Field(ge=1)
    """Side of the generated images, in pixels."""
    low_res_px: int | None = Field(default=None, ge=1)
    """Side of the low-resolution images that it upsamples, in pixels; null for a base model."""
    low_res_noise: LowResNoise | None = None
    """Noise-conditioning augmentation of the low-resolution image."""
    low_res_upsampling: Upsampling = "bicubic"
    """How the low-resolution image is resized to size_px, in training and sampling."""
    low_res_noise_at: Literal["size_px", "low_res_px"] = "size_px"
    """Size at which the low-resolution image gets its noise: size_px, after upsampling; low_res_px, before it, so that
    the noise is upsampled too (NeMo)."""
    low_res_scale: Literal["input", "variance_preserving"] = "input"
    """Factor on the noisy low-resolution image: input, that of the noisy image at the same noise level; for objective
    edm also variance_preserving, 1/sqrt(1 + sigma^2), which is that of the others (imagen-pytorch)."""

    @model_validator(mode="after")
    def _check(self) -> "DenoiserConfig":
        if self.unet.low_res != (self.low_res_px is not None):
            raise ValueError(
                f"low_res_px is {self.low_res_px}, but unet.low_res is {self.unet.low_res}; a super-resolution stage "
                "has both, a base model neither"
            )
        if self.low_res_px is not None and self.low_res_px >= self.size_px:
            raise ValueError(f"low_res_px must be smaller than size_px (got {self.low_res_px} and {self.size_px})")
        if self.unet.low_res_noise and self.low_res_noise is None:
            raise ValueError("low_res_noise: unet.low_res_noise reads a noise level; give {kind: lognormal}")
        if self.low_res_noise is not None and self.low_res_px is None:
            raise ValueError("low_res_noise needs low_res_px: a base model has no low-resolution image")
        if self.low_res_noise_at == "low_res_px" and self.low_res_upsampling != "bicubic_unclipped":
            raise ValueError(
                "low_res_noise_at=low_res_px needs low_res_upsampling=bicubic_unclipped, as the others clip what has "
                f"noise on it (got {self.low_res_upsampling})"
            )
        if self.low_res_scale != "input" and self.low_res_noise is None:
            raise ValueError(f"low_res_scale is {self.low_res_scale}, but without low_res_noise nothing is scaled")
        channels = self.unet.in_channels, self.unet.out_channels
        if is_learned(self.diffusion.variance) and channels[1] != 2 * channels[0]:
            raise ValueError(
                f"diffusion.variance={self.diffusion.variance} needs a network with twice as many unet.out_channels "
                f"as in_channels (got {channels[1]} and {channels[0]})"
            )
        flow = self.diffusion.flow
        if flow is not None and flow.size_px not in (None, self.size_px):
            raise ValueError(f"diffusion.schedule.size_px is {flow.size_px}, but size_px is {self.size_px}")
        if self.size_px % self.unet.sides_divisor:
            raise ValueError(f"size_px must be a multiple of {self.unet.sides_divisor} (got {self.size_px})")
        return self

    @property
    def network(self) -> UNetConfig:
        """The UNet, under the name that priors share."""
        return self.unet

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one generated image: (c, h, w)."""
        return self.unet.in_channels, self.size_px, self.size_px


class PriorConfig(Config):
    """A prior: it generates image embeddings from captions (Ramesh et al. 2022, arXiv 2204.06125, section 2.2).

    The embeddings are scaled to one length, so that they lie on a sphere, as CLIP's do when they are compared.
    """

    kind: Literal["prior"]
    network: AnyPriorNetworkConfig
    """The transformer; `{preset: NAME}` selects a published one."""
    diffusion: DiffusionConfig = DiffusionConfig(schedule=Discrete(beta="cosine"), objective="x0")
    """The diffusion process."""
    embed_length: float | None = Field(default=None, gt=0)
    """Length of the embeddings within the diffusion; null means the square root of their width, so that each
    component has variance 1 (DALLE2-pytorch: image_embed_scale)."""
    clamp_prediction: bool = False
    """Scale predictions of objective x0 to this length, in training and in sampling."""

    @model_validator(mode="after")
    def _check(self) -> "PriorConfig":
        diffusion = self.diffusion
        if is_learned(diffusion.variance) or diffusion.loss in ("kl", "rescaled_kl"):
            raise ValueError("diffusion: learned variances and the variational bound are for images")
        if diffusion.flow is not None and diffusion.flow.size_px is not None:
            raise ValueError("diffusion.schedule.size_px: is for images; give shift itself")
        if self.clamp_prediction and diffusion.objective != "x0":
            raise ValueError(f"clamp_prediction is for objective x0 (got {diffusion.objective})")
        steps = self.network.num_timesteps
        found = diffusion.schedule.num_steps if isinstance(diffusion.schedule, Discrete) else None
        if steps is not None and found != steps:
            raise ValueError(
                f"network.num_timesteps is {steps}, but diffusion.schedule has {found or 'no discrete'} steps; give "
                f"it kind: discrete and num_steps: {steps}, or set num_timesteps to null"
            )
        return self

    @property
    def length(self) -> float:
        """Length of the embeddings within the diffusion."""
        return self.embed_length or self.network.dim**0.5

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one generated embedding: (dim,)."""
        return (self.network.dim,)

    def to_length(self, embeds: Tensor) -> Tensor:
        """(..., dim) -> the same directions at `length`."""
        return F.normalize(embeds, dim=-1) * self.length


def _kind(value: Any) -> str:
    return value.get("kind", "images") if isinstance(value, dict) else getattr(value, "kind", "images")


AnyDenoiserConfig = Annotated[
    Annotated[DenoiserConfig, Tag("images")] | Annotated[PriorConfig, Tag("prior")], Discriminator(_kind)
]
"""A model to train: a stage of a cascade, or with `kind: prior` a prior."""
