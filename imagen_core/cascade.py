"""A cascade of diffusion models: a base that generates small images, and super-resolution stages.

Imagen (Saharia et al. 2022, arXiv 2205.11487, section 2.4): 64 -> 256 -> 1024 pixels. Each stage reads the
caption, and each super-resolution stage also the image of the previous stage, with a little noise on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from imagen_core.config import Config, default_field
from imagen_core.diffusion import Denoiser, DenoiserConfig, Guidance, Threshold, guided
from imagen_core.diffusion.low_res import upsample
from imagen_core.diffusion.shapes import default_shape, stage_shapes
from imagen_core.diffusion.steps import AnyGrid, Karras
from imagen_core.models.conditioning.base import Condition, Conditioning, unit_variance
from imagen_core.models.conditioning.characters import character_ids
from imagen_core.samplers import DpmSolverPP2M, Inpaint, SeededNoise, sample
from imagen_core.samplers.loop import Start
from imagen_core.samplers.registry import AnySampler
from imagen_core.text_batch import EncoderRecords, TextEmbeddings, each_encoder, null_text_tensor, pad_texts

OnStep = Callable[[int, int, int, Tensor], None]
"""Called after each step as (stage, steps done, number of steps, image (b, c, h, w) at its noise level)."""


Keep = Callable[[int, Tensor], Tensor]
"""Called after each stage but the last as (stage, its images (b, c, h, w) in [-1, 1]) -> bool (b,): the images that
continue to the next stage."""


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
    sqrt(1 + sigma^2), which is standard normal in DDPM's scale (diffusers' DDPM, DDIM and solvers; DeepFloyd IF)."""
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


class Cascade:
    """Stages in the order they run; each one generates larger images than the previous one."""

    def __init__(self, stages: Sequence[CascadeStage], encoder: EncoderRecords = None):
        """`encoder` describes the text encoder all stages were trained on; None if none reads captions. A list: every
        encoder that a stage reads, if one reads several.

        Raises:
            ValueError: no stages, sizes that do not rise, or settings that do not fit a stage.
        """
        sizes = [stage.size_px for stage in stages]
        if not sizes or sorted(set(sizes)) != sizes:
            raise ValueError(f"stages: sizes must rise from stage to stage (got {sizes} pixels)")
        for stage in stages:
            stage.check()
        self.stages = list(stages)
        self.encoder = encoder

    @property
    def sizes_px(self) -> list[int]:
        return [stage.size_px for stage in self.stages]

    def shapes(self, first: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of the images of each stage, from those of the first.

        Raises:
            ValueError: a side is no whole number of pixels in a stage, or one that its network cannot halve.
        """
        return stage_shapes([stage.config for stage in self.stages], first)

    @property
    def max_characters(self) -> int | None:
        """Most bytes of a transcription that every stage that reads them can read; None if no stage does."""
        return min((stage.max_characters for stage in self.stages if stage.max_characters is not None), default=None)

    @property
    def num_classes(self) -> int | None:
        """Classes that every stage that reads labels knows; None if no stage does."""
        return min((stage.num_classes for stage in self.stages if stage.num_classes is not None), default=None)

    @torch.no_grad()
    def sample(
        self,
        text: TextEmbeddings | None,
        seeds: Sequence[int],
        *,
        null_text: np.ndarray | Tensor | None = None,
        text_embed: Tensor | None = None,
        image_embed: Tensor | None = None,
        transcriptions: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        low_res: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        start_stage: int = 0,
        stop_stage: int | None = None,
        init_image: Tensor | None = None,
        strength: float = 1.0,
        inpaint: Inpaint | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        on_step: OnStep | None = None,
        keep: Keep | None = None,
    ) -> dict[int, Tensor]:
        """Samples one image per seed. An image depends on its own seed and caption alone, not on its batch.

        Args:
            text: one (num_tokens, dim) or (num_tokens, layers, dim) array per image, as the encoder's record says;
                where the cascade has several encoders, such arrays of each by its name. None samples without captions.
            null_text: (num_tokens, dim) or (num_tokens, layers, dim), takes the place of dropped captions in guidance:
                a negative prompt, or the empty caption, which stages with dropped_caption=empty_caption need.
            text_embed: (b, dim), the captions as one vector each, for stages that read them. Only their direction
                counts.
            image_embed: (b, dim), embeddings of the images to generate, for stages that read them: generated by a
                prior, or computed from existing images. Only their direction counts.
            transcriptions: the text to be written in each image; None, or an empty text, means no text.
            labels: the class of each image, from 0; -1 means unknown. None means that all are unknown.
            low_res: (b, 3, h, w) in [-1, 1], given to the first stage that runs in place of the image
                of the previous stage: super-resolution of an existing image.
            shape: height and width of the images of the first stage that runs; those of the others are this shape,
                scaled. None means squares; if low_res is not square, its shape times the factor of the stage.
            start_stage, stop_stage: the first stage to run, and the one before which to stop (as in a slice).
            init_image: (b, 3, H, W) in [-1, 1]; the first stage that runs starts from it instead of pure
                noise (SDEdit, Meng et al. 2022, arXiv 2108.01073).
            strength: in [0, 1], how much of the way init_image is sent back into noise.
            inpaint: image and mask of the part to keep, in any size; each stage keeps it. They are stretched to the
                shape of the stage, as init_image is.
            autocast: type for the network, e.g. torch.bfloat16; the sampler stays in `dtype`.
            keep: chooses after each stage which images the next one super-resolves; when none is left, the other
                stages do not run.
        Returns:
            Images of every stage that ran by size in pixels, (b, 3, h, w) in [-1, 1]; with `keep` fewer
            from stage to stage, in the same order.
        Raises:
            ValueError: inputs that do not fit the stages.
        """
        stages = self.stages[start_stage:stop_stage]
        if not stages:
            raise ValueError(f"no stage to run: start {start_stage}, stop {stop_stage} of {len(self.stages)}")
        if stages[0].is_super_resolution and low_res is None:
            raise ValueError(
                f"stage {start_stage} ({stages[0].size_px} px) needs a low-resolution image: give low_res, "
                "or start at a base stage"
            )
        if shape is None:
            shape = default_shape(stages[0].config, None if low_res is None else low_res.shape[-2:])
        shapes = stage_shapes([stage.config for stage in stages], shape)
        _check_embeds(stages, text_embed, image_embed, len(seeds))
        conditioning = self._conditioning(text, text_embed, image_embed, transcriptions, labels, len(seeds))
        if null_text is None and any(each.config.unet.needs_empty_caption for each in stages):
            raise ValueError('null_text: the stages need the encoding of "", or of a negative prompt')
        if null_text is not None:
            conditioning = conditioning.with_null_text(null_text_tensor(null_text, self.encoder))
            conditioning = conditioning if text is not None else conditioning.unconditional()
        conditioning = conditioning.to(device, dtype)
        current = None if low_res is None else low_res.to(device, dtype)
        start = None if init_image is None else init_image.to(device, dtype)
        images: dict[int, Tensor] = {}
        kept, last = list(seeds), start_stage + len(stages) - 1
        for number, stage in enumerate(stages, start_stage):
            stage.denoiser.to(device=device, dtype=dtype).eval()
            with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
                current = _sample_stage(
                    stage,
                    shapes[number - start_stage],
                    self._read_by(stage, conditioning),
                    SeededNoise(kept, stream=number),
                    low_res=current if stage.is_super_resolution else None,
                    init_image=start if number == start_stage else None,
                    strength=strength,
                    inpaint=inpaint,
                    on_step=None if on_step is None else partial(on_step, number),
                )
            stage.denoiser.to("cpu")  # the next stage needs the room
            images[stage.size_px] = current.clamp(-1, 1)
            if keep is not None and number < last:
                rows = _kept_rows(keep(number, images[stage.size_px]), len(kept)).to(current.device)
                kept = [seed for seed, is_kept in zip(kept, rows.tolist(), strict=True) if is_kept]
                if not kept:
                    break
                current, conditioning = current[rows], conditioning.map(lambda t, rows=rows: t[rows])
                inpaint = None if inpaint is None else inpaint.rows(rows)
        return images

    def _conditioning(
        self,
        text: TextEmbeddings | None,
        text_embed: Tensor | None,
        image_embed: Tensor | None,
        transcriptions: Sequence[str] | None,
        labels: Sequence[int] | None,
        batch: int,
    ) -> Conditioning:
        """All conditions but the low-resolution image, on the CPU."""
        embeddings, mask = pad_texts(text, batch, self.encoder)
        return Conditioning(
            text=embeddings,
            text_mask=mask,
            text_embed=None if text_embed is None else unit_variance(text_embed),
            characters=self._characters(transcriptions, batch),
            labels=self._labels(labels, batch),
            image_embed=None if image_embed is None else unit_variance(image_embed),
        )

    def _read_by(self, stage: CascadeStage, conditioning: Conditioning) -> Conditioning:
        """The conditions with the tokens of the encoders that a stage reads, where the cascade has several."""
        text, mask = conditioning.text, conditioning.text_mask
        dims = stage.config.unet.text_dim
        if not isinstance(text, tuple) or not isinstance(mask, tuple) or dims is None:
            return conditioning
        names = [encoder["name"] for encoder in each_encoder(self.encoder)]
        at = [names.index(name) for name in (names if stage.encoders is None else stage.encoders)]
        if isinstance(dims, tuple):
            return replace(conditioning, text=tuple(text[k] for k in at), text_mask=tuple(mask[k] for k in at))
        return replace(conditioning, text=text[at[0]], text_mask=mask[at[0]])

    def _characters(self, transcriptions: Sequence[str] | None, batch: int) -> Tensor | None:
        if self.max_characters is None:
            if transcriptions is not None:
                raise ValueError("transcriptions: no stage reads them; leave them out")
            return None
        if transcriptions is None:
            transcriptions = [""] * batch
        if len(transcriptions) != batch:
            raise ValueError(f"transcriptions: {len(transcriptions)} for {batch} images; give one per image")
        return character_ids(transcriptions, self.max_characters)

    def _labels(self, labels: Sequence[int] | None, batch: int) -> Tensor | None:
        if self.num_classes is None:
            if labels is not None:
                raise ValueError("labels: no stage reads them; leave them out")
            return None
        if labels is None:
            labels = [-1] * batch
        if len(labels) != batch:
            raise ValueError(f"labels: {len(labels)} for {batch} images; give one per image")
        if wrong := [label for label in labels if not -1 <= label < self.num_classes]:
            raise ValueError(f"labels: {wrong[0]} is none of 0 to {self.num_classes - 1}, nor -1 for an unknown class")
        return torch.tensor(list(labels), dtype=torch.long)


def _sample_stage(
    stage: CascadeStage,
    size: tuple[int, int],
    conditioning: Conditioning,
    noise: SeededNoise,
    *,
    low_res: Tensor | None,
    init_image: Tensor | None,
    strength: float,
    inpaint: Inpaint | None,
    on_step: Callable[[int, int, Tensor], None] | None,
) -> Tensor:
    """One stage: (b, 3, *size) about in [-1, 1]."""
    denoiser, settings = stage.denoiser, stage.sampling
    weight = next(denoiser.parameters())
    shape = (stage.config.shape[0], *size)
    for condition in set(get_args(Condition)) - stage.conditions:
        conditioning = conditioning.without_inputs(condition)
    conditioning = conditioning.map_text(lambda tokens: tokens[:, : stage.max_tokens])
    if low_res is not None:
        conditioning = denoiser.with_sampling_low_res(
            conditioning, low_res, noise.normal(shape, weight.device, weight.dtype), settings.low_res_sigma
        )
    return sample(
        settings.sampler,
        guided(denoiser, conditioning, settings.guidance, settings.threshold),
        settings.grid.sigmas(denoiser.config.diffusion.schedule, settings.num_steps),
        noise,
        shape,
        device=weight.device,
        dtype=weight.dtype,
        init_image=None if init_image is None else upsample(init_image, size),
        strength=strength,
        start=settings.start,
        inpaint=None if inpaint is None else _resized(inpaint, size),
        schedule=denoiser.config.diffusion.schedule,
        on_step=on_step,
    )


def _kept_rows(rows: Tensor, count: int) -> Tensor:
    """The answer of `keep`; ValueError unless it is bool (count,)."""
    if rows.shape != (count,) or rows.dtype != torch.bool:
        raise ValueError(f"keep: give one bool for each of {count} images (got {rows.dtype} {tuple(rows.shape)})")
    return rows


def _check_embeds(
    stages: Sequence[CascadeStage], text_embed: Tensor | None, image_embed: Tensor | None, count: int
) -> None:
    """Refuses missing embeddings, and embeddings of another width or number."""
    for stage in stages:
        for name, of, dim, embed, remedy in (
            ("text_embed", "captions' vectors", stage.text_embed_dim, text_embed, "give one for each caption"),
            ("image_embed", "image embeddings", stage.image_embed_dim, image_embed, "generate them with a prior"),
        ):
            if dim is not None and (embed is None or tuple(embed.shape) != (count, dim)):
                found = None if embed is None else tuple(embed.shape)
                raise ValueError(
                    f"{name}: the {stage.size_px} px stage reads {of} ({count}, {dim}) (got {found}); {remedy}"
                )


def _resized(inpaint: Inpaint, size: tuple[int, int]) -> Inpaint:
    """Image and mask in another size; a pixel is kept where more than half of it was."""
    keep = F.interpolate(inpaint.keep.float(), size=size, mode="area") > 0.5
    return Inpaint(upsample(inpaint.image, size), keep, inpaint.resample_times)
