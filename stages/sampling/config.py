"""What to sample, and with which models."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from imagen_core.cascade import SamplingConfig
from imagen_core.config import default_field
from imagen_core.prior import PriorSamplingConfig
from imagen_core.train import LoraUseConfig
from pipeline.config import Config
from stages.sampling.caption_sets import AnyCaptions

Precision = Literal["float32", "bfloat16", "float16"]
_ASPECT = re.compile(r"[1-9]\d{0,3}:[1-9]\d{0,3}")


class GuideConfig(Config):
    """A worse model of the same images, such as a smaller one or an earlier checkpoint, which guides a stage
    (autoguidance); its weight is sampling.guidance.autoguidance."""

    checkpoint: str
    """Run folder of a training, or a checkpoint folder; a path or a URL."""
    weights: str | None = None
    """`model`, or an average, as of a stage; null: the slowest average."""
    lora: LoraUseConfig | None = default_field(None)
    """How the adapter of a training with `lora` is added to its base; null: merged, at full scale."""


class SampleStageConfig(Config):
    """One stage of the cascade."""

    checkpoint: str
    """Run folder of a training (its newest checkpoint is taken), or a checkpoint folder; a path or a URL."""
    weights: str | None = None
    """`model`, one of the averages such as `ema-0.9999`, or one of any length such as `power-0.07`, which is rebuilt
    from the training's snapshots (ema.profiles); null: the slowest average."""
    lora: LoraUseConfig | None = default_field(None)
    """How the adapter of a training with `lora` is added to its base; null: merged, at full scale."""
    guide: GuideConfig | None = default_field(None)
    """A worse model that guides this one (autoguidance); null: none."""
    sampling: SamplingConfig = SamplingConfig()
    """How the stage samples."""


class SamplePriorConfig(Config):
    """A prior, which generates the image embeddings that the stages of DALL-E 2's decoder read."""

    checkpoint: str
    """Run folder of a training with denoiser.kind: prior, or a checkpoint folder; a path or a URL."""
    weights: str | None = None
    """`model`, or one of the averages such as `ema-0.9999`; null: the slowest average."""
    encoder_model: str | None = None
    """Where the text encoder is whose vectors the prior reads (hub id or folder), if it is not found under the name it
    was trained with. If the tokens it reads are from another model, that one is found as the stages' encoder is."""
    lora: LoraUseConfig | None = default_field(None)
    """How the adapter of a training with `lora` is added to its base; null: merged, at full scale."""
    sampling: PriorSamplingConfig = PriorSamplingConfig()
    """How the prior samples."""


class InitConfig(Config):
    """Image to image: the first stage starts from images instead of pure noise."""

    images: tuple[str, ...] = Field(min_length=1)
    """Images to start from, one per prompt."""
    strength: float = Field(default=0.7, ge=0, le=1)
    """How far the images are sent back into noise: 0 keeps them, 1 forgets them."""
    encode: bool = default_field(False)
    """Start from the noise that the stage itself would generate the images from without prompts (reversed DDIM),
    instead of random noise: what the prompt does not change stays, even at strength 1, and the seed does not matter.
    For samplers that add no noise."""


class InpaintConfig(Config):
    """Inpainting: a part of an image is kept, and the rest is generated."""

    image: str
    """Image of which a part is kept."""
    mask: str
    """Image that is white where `image` is kept; what is transparent counts as white."""
    resample_times: int = Field(default=5, ge=1)
    """Rounds of denoising and re-noising at each step (RePaint)."""


class OutputConfig(Config):
    """Which files are written."""

    size_px: int | None = Field(default=None, ge=1)
    """Stop after the stage of this size; the stages behind it are not loaded. null: run all stages."""
    all_sizes: bool = True
    """Write the images of every stage; false: only those of the last stage."""
    text: bool = False
    """Write the prompt of INDEX.png to INDEX.txt next to it."""

    def written_px(self, sizes_px: Sequence[int]) -> list[int]:
        """The sizes that are written, from the sizes of all stages."""
        return list(sizes_px if self.all_sizes else sizes_px[-1:])


class PartConfig(Config):
    """A share of the images, so that several processes or machines generate all of them together."""

    index: int = Field(ge=0)
    """Which share, from 0."""
    count: int = Field(ge=1)
    """Number of shares."""

    @model_validator(mode="after")
    def _check(self) -> "PartConfig":
        if self.index >= self.count:
            raise ValueError(f"index {self.index} of {self.count} parts: the last one is {self.count - 1}")
        return self


class RequestConfig(Config):
    """Which images to generate: from which prompts, images and seeds."""

    prompts: tuple[str, ...] = ()
    """The prompts."""
    prompts_file: str | None = None
    """Text file with one prompt per line, instead of `prompts`; after a tab, the transcription."""
    captions: AnyCaptions | None = None
    """Captions of a store or a file, all or a seeded selection, instead of `prompts`. A store's transcriptions and
    labels come with them."""
    negative_prompt: str | None = Field(default=None, exclude_if=lambda prompt: prompt is None)
    """What guidance leads away from, in all images, in place of a dropped caption. null: a dropped caption as in
    training, which is the empty prompt for models with dropped_caption=empty_caption."""
    transcriptions: tuple[str, ...] = ()
    """The text to be written in each image, one per prompt, for a cascade that reads them; default: none."""
    labels: tuple[int, ...] = ()
    """The class of each image from 0, -1 for an unknown one, one per prompt, for a cascade that reads labels; default:
    unknown."""
    low_res: tuple[str, ...] = ()
    """Images to super-resolve, one per prompt: the first stage of `stages` must be a super-resolution stage. The
    centre square, or the centre of the shape to generate, is resized to the size which that stage upsamples."""
    condition_images: dict[str, tuple[str, ...]] = Field(default_factory=dict, exclude_if=lambda images: not images)
    """Further images for stages that were trained with `condition_images`, one per prompt, by name, such as `{depth:
    [depth.png]}`. The centre square, or the centre of the shape to generate, is resized to each stage's."""
    init: InitConfig | None = None
    """Image to image; null: start from pure noise."""
    inpaint: InpaintConfig | None = None
    """Inpainting; null: generate the full image."""
    size: tuple[int, int] | None = None
    """Height and width in pixels of the last stage's images; those of the other stages have the same ratio. null:
    squares, or as `aspect` says."""
    aspect: str | tuple[str, ...] | None = None
    """Width to height of the images, such as `3:2`, or one for each prompt: each stage's shape is the nearest of those
    with the area of its square, as in a store of aspect-ratio buckets. null: squares; for captions of a store of
    buckets, each image has the shape of its sample."""
    num_images_per_prompt: int = Field(default=1, ge=1)
    """Images per prompt, with different seeds."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first image; the next images have the next seeds."""
    seeds: tuple[int, ...] | None = None
    """One seed per image, instead of `seed`."""

    def lists(self) -> Mapping[str, Sequence[object]]:
        """The lists with one entry per prompt, by key; empty where not given."""
        init = () if self.init is None else self.init.images
        return {
            "low_res": self.low_res,
            **{f"condition_images.{name}": paths for name, paths in self.condition_images.items()},
            "init.images": init,
            "transcriptions": self.transcriptions,
            "labels": self.labels,
            "aspect": () if isinstance(self.aspect, str | None) else self.aspect,
        }

    @field_validator("aspect")
    @classmethod
    def _check_aspect(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        given = [value] if isinstance(value, str) else value
        wrong = None if given is None else next((each for each in given if not _ASPECT.fullmatch(each)), None)
        if wrong is not None:
            raise ValueError(f"must be width:height in whole numbers, such as 3:2 (got {wrong!r})")
        if given is not None and not given:
            raise ValueError("is empty; give one such as 3:2, one for each prompt, or null")
        return value

    @model_validator(mode="after")
    def _check(self) -> "RequestConfig":
        if sum(map(bool, (self.prompts, self.prompts_file, self.captions))) > 1:
            raise ValueError("give one of prompts, prompts_file and captions")
        if self.size is not None and (self.aspect is not None or min(self.size) < 1):
            raise ValueError(f"size: give height and width in pixels, without aspect (got {list(self.size)})")
        if self.transcriptions and (self.prompts_file or self.captions):
            raise ValueError("transcriptions go with prompts; in a prompts_file they follow a tab")
        if self.labels and self.captions:
            raise ValueError("labels go with prompts; those of a store come with its captions")
        for name, entries in self.lists().items():
            if entries and self.prompts and len(entries) != len(self.prompts):
                raise ValueError(f"{name} has {len(entries)} entries for {len(self.prompts)} prompts; give one each")
        return self


class SampleConfig(RequestConfig):
    """What to sample, and with which models."""

    stages: tuple[SampleStageConfig, ...] = Field(min_length=1)
    """The cascade, smallest images first."""
    prior: SamplePriorConfig | None = None
    """For stages that read image embeddings."""
    encoder_model: str | dict[str, str] | None = None
    """Where the text encoder is (hub id or folder), if it is not found under the name it was trained with. For models
    that read several, by name, such as `{t5: models/t5, clip: models/clip}`."""
    text_embed_model: str | None = None
    """Likewise the encoder of captions as one vector, for models with text_embed_dim."""
    output: OutputConfig = OutputConfig()
    """Which files are written."""
    part: PartConfig | None = None
    """Generate only this share of the images; names and seeds are those of all images, so that the shares add up.
    null: share RANK of WORLD_SIZE if the environment has them (torchrun), otherwise all."""
    batch_size: int = Field(default=8, ge=1)
    """Images sampled at once; changes nothing in them but speed."""
    precision: Precision = "float32"
    """Type of the network's matrix products (autocast); weights and sampler stay in float32."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` ..."""

    def recorded(self) -> dict[str, object]:
        """The settings that change images, for the record in the output folder."""
        changes_nothing = ("batch_size", "device", "encoder_model", "text_embed_model", "part")
        in_requests = ("captions", "transcriptions", "labels", "size", "aspect")  # the record has those of each image
        exclude = {**dict.fromkeys((*changes_nothing, *in_requests), True), "output": {"all_sizes", "text"}}
        return self.model_dump(mode="json", exclude=exclude)
