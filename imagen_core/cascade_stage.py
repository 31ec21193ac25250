"""One stage of a cascade: a denoiser, how it samples, and the sampling."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from imagen_core.condition_images import channels_of, joined_images
from imagen_core.config import Config, default_field
from imagen_core.diffusion import Denoiser, DenoiserConfig, Guidance, PriorConfig, Threshold, guided
from imagen_core.diffusion.low_res import upsample
from imagen_core.diffusion.steps import AnyGrid, Karras
from imagen_core.models.conditioning.base import Condition, Conditioning
from imagen_core.samplers import DpmSolverPP2M, Inpaint, SeededNoise, encode, sample
from imagen_core.samplers.loop import Start
from imagen_core.samplers.registry import AnySampler

_OF_GUIDES = (
    *("size_px", "shape", "diffusion.schedule"),
    *("low_res_px", "low_res_noise", "low_res_noise_at", "low_res_scale", "low_res_upsampling", "unet.low_res_noise"),
    *("unet.text_dim", "unet.num_text_layers", "unet.text_embed_dim", "unet.needs_empty_caption"),
    *("unet.num_classes", "unet.image_embed_dim", "unet.condition_channels"),
    *("unet.transcription.max_characters",),
)
"""What a guide has in common with the model that it guides."""


class SamplingConfig(Config):
    """How one stage samples."""

    sampler: AnySampler = DpmSolverPP2M()
    """The solver."""
    grid: AnyGrid = Karras()
    """Where the noise levels lie."""
    num_steps: int = Field(default=30, ge=1)
    """Noise levels to visit."""
    guidance: Guidance = Guidance()
    """Classifier-free guidance weights; 1 means no guidance."""
    threshold: Threshold = Threshold()
    """Clipping of the estimated image at each step."""
    start: Start = default_field("sigma")
    """Standard deviation of the noise that sampling starts from: sigma, the first noise level; unit_variance,
    sqrt(1 + sigma^2), which is standard normal in DDPM's scale (diffusers' DDPM, DDIM and solvers; DeepFloyd IF); with
    a flow schedule noise_scale + sigma, which is pure noise in its scale (diffusers)."""
    low_res_sigma: float | None = Field(default=None, ge=0)
    """Noise put on the low-resolution image; null: the level the stage's config names."""


@dataclass(frozen=True, slots=True)
class CascadeStage:
    """A denoiser and how to sample with it."""

    denoiser: Denoiser
    sampling: SamplingConfig
    max_tokens: int | None = None
    """Longer captions are truncated, as they were in training; None means never."""
    trained_shapes: tuple[tuple[int, int], ...] = ()
    """Height and width of the images it was trained on; none where they are not known."""
    encoders: tuple[str, ...] | None = None
    """Names of the text encoders whose tokens it reads, where the cascade has several; None means all."""
    condition_images: Mapping[str, int] = field(default_factory=dict)
    """Channels of each further image that it reads, in their order; empty for one of the name `images`."""
    guide: Denoiser | None = None
    """A worse model of the same images and conditions, for autoguidance."""

    @property
    def further_images(self) -> dict[str, int]:
        """Channels of each further image that it reads, by name; empty if it reads none."""
        return channels_of(self.condition_images, self.config.unet.condition_channels)

    @property
    def config(self) -> DenoiserConfig:
        """The denoiser's configuration; ValueError if it is a prior's."""
        if not isinstance(self.denoiser.config, DenoiserConfig):
            raise ValueError("a stage of a cascade generates images; this checkpoint is a prior: give it as `prior`")
        return self.denoiser.config

    @property
    def size_px(self) -> int:
        return self.config.size_px

    @property
    def max_characters(self) -> int | None:
        """Most bytes of a transcription; None if the stage reads none."""
        settings = self.config.unet.transcription
        return None if settings is None else settings.max_characters

    @property
    def num_classes(self) -> int | None:
        """Classes whose labels it reads; None if it reads none."""
        return self.config.unet.num_classes

    @property
    def conditions(self) -> frozenset[Condition]:
        """What its network reads in addition to the noisy image."""
        unet = self.config.unet
        found: dict[Condition, object] = {
            "text": unet.text_dim or unet.text_embed_dim,
            "transcription": unet.transcription,
            "labels": unet.num_classes,
            "image_embed": unet.image_embed_dim,
            "low_res": self.config.low_res_px,
        }
        return frozenset(condition for condition, value in found.items() if value is not None)

    def check(self) -> None:
        """Raises ValueError if a sampling setting does not fit its model, or would have no effect."""
        settings, prefix = self.sampling, f"stages: the {self.size_px} px stage:"
        if settings.low_res_sigma is not None and self.config.low_res_noise is None:
            raise ValueError(
                f"{prefix} low_res_sigma is {settings.low_res_sigma}, but it was not trained with noise on "
                "low-resolution images; leave it out"
            )
        for condition in get_args(Condition):
            weight = getattr(settings.guidance, condition)
            if weight != 1 and condition not in self.conditions:
                raise ValueError(
                    f"{prefix} guidance.{condition} is {weight:g}, but the model was not trained with it; it reads "
                    f"{', '.join(sorted(self.conditions)) or 'no condition'}: leave it out"
                )
        if self.guide is not None:
            if differs := _unlike(self.config, self.guide.config):
                raise ValueError(f"{prefix} its guide has another {differs}; take a guide like the stage's model")
        elif settings.guidance.autoguidance != 1:
            raise ValueError(
                f"{prefix} guidance.autoguidance is {settings.guidance.autoguidance:g}, but the stage has no guide; "
                "name a worse model as its guide, or leave autoguidance out"
            )
        try:
            settings.grid.sigmas(self.config.diffusion.schedule, settings.num_steps)
        except ValueError as error:
            raise ValueError(f"{prefix} {error}") from error

    @property
    def is_super_resolution(self) -> bool:
        return self.config.low_res_px is not None

    @property
    def text_embed_dim(self) -> int | None:
        """Width of the captions' vectors that it reads; None if it reads none."""
        return self.config.unet.text_embed_dim

    @property
    def image_embed_dim(self) -> int | None:
        """Width of the image embeddings it reads; None if it reads none."""
        return self.config.unet.image_embed_dim


def sample_stage(
    stage: CascadeStage,
    size: tuple[int, int],
    conditioning: Conditioning,
    noise: SeededNoise,
    *,
    further: Mapping[str, Tensor],
    low_res: Tensor | None,
    init_image: Tensor | None,
    strength: float,
    encode_init: bool = False,
    inpaint: Inpaint | None,
    on_step: Callable[[int, int, Tensor], None] | None,
) -> Tensor:
    """Runs one stage.

    Args:
        further: (b, c, H, W) in [-1, 1] by name, the further images of which it reads some, in any size.
        encode_init: start from the noise that the stage itself would generate init_image from without conditions,
            instead of sampled noise.
    Returns:
        (b, 3, *size), about in [-1, 1].
    Raises:
        ValueError: encode_init, and the sampler adds noise.
    """
    denoiser, settings = stage.denoiser, stage.sampling
    weight = next(denoiser.parameters())
    shape, schedule = (stage.config.shape[0], *size), denoiser.config.diffusion.schedule
    for condition in set(get_args(Condition)) - stage.conditions:
        conditioning = conditioning.without_inputs(condition)
    conditioning = conditioning.map_text(lambda tokens: tokens[:, : stage.max_tokens])
    if stage.further_images:
        conditioning = replace(conditioning, images=joined_images(further, stage.further_images, size))
    if low_res is not None:
        conditioning = denoiser.with_sampling_low_res(
            conditioning, low_res, noise.normal(shape, weight.device, weight.dtype), settings.low_res_sigma
        )
    sigmas, latent, start = settings.grid.sigmas(schedule, settings.num_steps), None, settings.start
    init_image = None if init_image is None else upsample(init_image, size)
    if encode_init and init_image is not None:
        sigmas = sigmas[len(sigmas) - 1 - round(strength * (len(sigmas) - 1)) :]
        if len(sigmas) == 1:
            return init_image
        latent, init_image, start = _latent(stage, conditioning, sigmas, init_image.to(weight)), None, "sigma"
    return sample(
        settings.sampler,
        guided(denoiser, conditioning, settings.guidance, settings.threshold, stage.guide),
        sigmas,
        noise,
        shape,
        device=weight.device,
        dtype=weight.dtype,
        init_image=init_image,
        strength=strength,
        latent=latent,
        start=start,
        inpaint=None if inpaint is None else _resized(inpaint, size),
        schedule=schedule,
        on_step=on_step,
    )


def _unlike(config: DenoiserConfig, guide: DenoiserConfig | PriorConfig) -> str:
    """What a guide's images, noise levels or conditions have that is not the stage's; empty if it fits."""
    if not isinstance(guide, DenoiserConfig):
        return "kind: prior"
    for name in _OF_GUIDES:
        mine, theirs = (_at(each, name) for each in (config, guide))
        if mine != theirs:
            return f"{name}: {_shown(theirs)}, and not {_shown(mine)}"
    return ""


def _at(config: DenoiserConfig, name: str) -> object:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _shown(value: object) -> str:
    return str(value.model_dump(mode="json")) if isinstance(value, Config) else str(value)


def _latent(stage: CascadeStage, conditioning: Conditioning, sigmas: Tensor, image: Tensor) -> Tensor:
    """The noise from which the stage would generate an image without conditions but the low-resolution image."""
    for condition in stage.conditions - {"low_res"}:
        conditioning = conditioning.without(condition)
    plain = guided(stage.denoiser, conditioning, Guidance(), Threshold(kind="none"))
    return encode(stage.sampling.sampler, plain, sigmas, image, schedule=stage.denoiser.config.diffusion.schedule)


def _resized(inpaint: Inpaint, size: tuple[int, int]) -> Inpaint:
    """Image and mask in another size; a pixel is kept where more than half of it was."""
    keep = F.interpolate(inpaint.keep.float(), size=size, mode="area") > 0.5
    return Inpaint(upsample(inpaint.image, size), keep, inpaint.resample_times)
