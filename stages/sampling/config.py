"""What to draw, and with what."""

from typing import Literal

from pydantic import Field, model_validator

from imagen_core.cascade import SamplingConfig
from imagen_core.prior import PriorSamplingConfig
from pipeline.config import Config
from stages.sampling.caption_sets import AnyCaptions


class SampleStageConfig(Config):
    """One stage of the cascade."""

    checkpoint: str
    """Run folder of a training (its newest checkpoint is taken), or a checkpoint folder; a path or a URL."""
    weights: str | None = None
    """`model`, or one of the averages such as `ema-0.9999`; null: the slowest average."""
    sampling: SamplingConfig = SamplingConfig()
    """How it draws."""


class SamplePriorConfig(Config):
    """A prior, which draws the image embeddings that the stages of DALL-E 2's decoder read."""

    checkpoint: str
    """Run folder of a training with denoiser.kind: prior, or a checkpoint folder; a path or a URL."""
    weights: str | None = None
    """`model`, or one of the averages such as `ema-0.9999`; null: the slowest average."""
    encoder_model: str | None = None
    """Where the text encoder is whose vectors it reads (hub id or folder), if it is not found under the name it was
    trained with. If the tokens it reads are by another model, that is found as the stages' is."""
    sampling: PriorSamplingConfig = PriorSamplingConfig()
    """How it draws."""


class PartConfig(Config):
    """A share of the images, so that several processes or machines draw them all."""

    index: int = Field(ge=0)
    """Which one, from 0."""
    count: int = Field(ge=1)
    """Of how many."""

    @model_validator(mode="after")
    def _check(self) -> "PartConfig":
        if self.index >= self.count:
            raise ValueError(f"index {self.index} of {self.count} parts: the last one is {self.count - 1}")
        return self


class SampleConfig(Config):
    """What to draw, and with what."""

    stages: tuple[SampleStageConfig, ...] = Field(min_length=1)
    """The cascade, smallest images first."""
    prior: SamplePriorConfig | None = None
    """For stages that read image embeddings."""
    output_px: int | None = Field(default=None, ge=1)
    """Stop after the stage of this size; the stages behind it are not loaded. null: draw with all of them."""
    prompts: tuple[str, ...] = ()
    """What to draw."""
    transcriptions: tuple[str, ...] = ()
    """The text to be written in each image, one a prompt, for a cascade that reads them; default: none."""
    labels: tuple[int, ...] = ()
    """The class of each image from 0, -1 for an unknown one, one a prompt, for a cascade that reads labels; default:
    unknown."""
    prompts_file: str | None = None
    """Text file with one prompt a line, instead of `prompts`; after a tab, the transcription."""
    captions: AnyCaptions | None = None
    """Captions of a store or a file, all or a seeded selection, instead of `prompts`. A store's transcriptions and
    labels come with them."""
    part: PartConfig | None = None
    """Draw only this share of the images; names and seeds are those of the whole, so that shares add up to it. null:
    share RANK of WORLD_SIZE where the environment has them (torchrun), else all."""
    num_images_per_prompt: int = Field(default=1, ge=1)
    """Images of each prompt, with different seeds."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first image; the next images have the next seeds."""
    seeds: tuple[int, ...] | None = None
    """One seed an image, instead of `seed`."""
    low_res: tuple[str, ...] = ()
    """Images to enlarge, one a prompt: the first stage of `stages` must be a super-resolution stage. The centre
    square is brought to the size that stage enlarges."""
    init_image: tuple[str, ...] = ()
    """Images to start from, one a prompt (image to image)."""
    strength: float = Field(default=0.7, ge=0, le=1)
    """How far init_image is sent back into noise: 0 keeps it, 1 forgets it."""
    inpaint_image: str | None = None
    """Image of which a part is kept."""
    inpaint_mask: str | None = None
    """Image that is white where inpaint_image is kept."""
    inpaint_resample_times: int = Field(default=5, ge=1)
    """Rounds of drawing and re-noising at each step (RePaint)."""
    batch_size: int = Field(default=8, ge=1)
    """Images drawn at once; changes nothing in them but speed."""
    encoder_model: str | None = None
    """Where the text encoder is (hub id or folder), if it is not found under the name it was trained with."""
    save_all_sizes: bool = True
    """Write the images of every stage; false: only those of the last."""
    save_text: bool = False
    """Write the prompt of INDEX.png to INDEX.txt beside it."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the network's matrix products (autocast); weights and sampler stay in float32."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` ..."""

    @model_validator(mode="after")
    def _check_prompts(self) -> "SampleConfig":
        if sum(map(bool, (self.prompts, self.prompts_file, self.captions))) > 1:
            raise ValueError("give one of prompts, prompts_file and captions")
        if self.transcriptions and (self.prompts_file or self.captions):
            raise ValueError("transcriptions go with prompts; in a prompts_file they follow a tab")
        if self.labels and self.captions:
            raise ValueError("labels go with prompts; those of a store come with its captions")
        for name in ("low_res", "init_image", "transcriptions", "labels"):
            given = getattr(self, name)
            if given and self.prompts and len(given) != len(self.prompts):
                raise ValueError(f"{name} has {len(given)} entries for {len(self.prompts)} prompts; give one each")
        if (self.inpaint_image is None) != (self.inpaint_mask is None):
            raise ValueError("inpaint_image and inpaint_mask come together")
        return self
