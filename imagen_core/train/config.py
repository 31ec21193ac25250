"""Everything that decides a training run."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from imagen_core.config import Config
from imagen_core.diffusion import AnyDenoiserConfig, DenoiserConfig, PriorConfig
from imagen_core.diffusion.schedules import Discrete
from imagen_core.models.conditioning.transcription import TranscriptionConfig
from imagen_core.models.prior import PriorNetworkConfig
from imagen_core.store import DEFAULT_CACHE_BYTES
from imagen_core.train.augment import AugmentConfig, BlurConfig

Precision = Literal["float32", "bfloat16", "float16", "float64"]


class ParameterGroup(Config):
    """Parameters with settings of their own."""

    match: str = Field(min_length=1)
    """Regular expression for the beginning of a parameter's name, e.g. `net\\.inputs\\.text`; of several groups the
    first that fits has the parameter."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate after warm-up, which follows the schedule of the others; null: the optimizer's."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of matrices and kernels; null: the optimizer's."""

    @model_validator(mode="after")
    def _check(self) -> "ParameterGroup":
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match: {self.match!r} is no regular expression ({error})") from error
        return self


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019), and its learning rate over time."""

    lr: float = Field(default=1e-4, gt=0)
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and of the running square of gradients."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of matrices and kernels; biases and norms have none."""
    warmup_steps: int = Field(default=10_000, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Step at which cosine decay ends; null: num_steps."""
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end of cosine decay, as a fraction of lr."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters with another learning rate or weight decay, by name."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas: each must be in [0, 1) (got {beta})")
        return self


class EmaConfig(Config):
    """Moving averages of the weights, float32."""

    rates: tuple[float, ...] = (0.9999,)
    """Decay of each average. All begin as the plain mean of the weights so far, until the decay is reached."""
    every_steps: int = Field(default=1, ge=1)
    """Steps between updates."""
    on_cpu: bool = False
    """Keep them in main memory: frees 4 bytes a parameter and average on the GPU, and each update copies the weights.
    Set every_steps to 10 or so to make it cheap."""

    @model_validator(mode="after")
    def _check(self) -> "EmaConfig":
        for rate in self.rates:
            if not 0 <= rate < 1:
                raise ValueError(f"rates: each must be in [0, 1) (got {rate})")
        if len(set(self.rates)) != len(self.rates):
            raise ValueError(f"rates: each once (got {self.rates})")
        return self


class TrainConfig(Config):
    """One training run: one stage of a cascade, from one store."""

    store: str
    """Folder or fsspec URL of the store; the only thing training reads."""
    cache_dir: str | None = None
    """Local folder for checked copies of a far store's files, shared by the processes of a machine; null: none."""
    cache_bytes: int = Field(default=DEFAULT_CACHE_BYTES, ge=1)
    """Most bytes of cache_dir; the least recently used files are removed."""
    shuffle_window_shards: int | None = Field(default=None, ge=1)
    """Shards in random order, samples shuffled within this many of them; null: all samples with each other."""
    denoiser: AnyDenoiserConfig
    """The model and its diffusion."""
    text: str | None = None
    """Encoder in the store whose embeddings the model reads; null: not conditioned on captions."""
    text_embed: str | None = None
    """Text encoder in the store with one vector a caption, in a space shared with images; a prior reads it."""
    image_embed: str | None = None
    """Image encoder in the store: a prior learns to draw its embeddings, a decoder reads them."""
    max_tokens: int = Field(default=128, ge=1)
    """Longer captions are cut."""
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Part of the captions left out, so that guidance has an unconditional model."""
    image_embed_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Part of the image embeddings left out, independently of captions; for a prior, of the noisy ones it sees."""
    self_conditioning_fraction: float = Field(default=0.5, ge=0, le=1)
    """Part of the samples whose network is shown its own first estimate, if it has self_conditioning."""
    transcription_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Part of the transcriptions left out, drawn apart from the captions'; only for a model that reads them."""
    label_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Part of the class labels left out, drawn apart from the others; only for a model with num_classes."""
    all_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Part of the images whose captions, transcriptions, labels and embeddings are left out together, beside what is
    left out of each apart."""
    crop_px: int | None = Field(default=None, ge=1)
    """Train super-resolution on random crops of this side; null: on whole images."""
    augment: AugmentConfig | None = None
    """Train on random cuts of a larger stored size; null: on whole images, or on crops of crop_px."""
    low_res_blur: BlurConfig | None = None
    """Blur some of the low-resolution images, in training only; null: none."""
    low_res_grayscale: float = Field(default=0.0, ge=0, le=1)
    """Part of the low-resolution images without colours; 1 makes a model that colours images."""
    horizontal_flip: float = Field(default=0.0, ge=0, le=1)
    """Part of the images to mirror; true is half. Images that are known to show writing are never mirrored.
    Wrong where captions tell left from right."""
    num_steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(ge=1)
    """Images of one step, over all processes."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Most images of a process at once; gradients are accumulated over the rest. null: all at once."""
    init_from: str | None = None
    """Begin with the weights of another training: its run folder, or a checkpoint folder. null: random weights."""
    init_weights: str | None = None
    """Which of its weights: `model`, or an average such as `ema-0.9999`; null: the slowest average."""
    init_mismatch: Literal["error", "skip"] = "error"
    """Tensors that only one of the two models has, or that differ in shape: refuse, or leave them random."""
    seed: int = Field(default=0, ge=0)
    """Decides weights, order, noise and dropout."""
    precision: Precision = "float32"
    """bfloat16 and float16 compute in it (autocast) and keep float32 weights. float16, for GPUs without bfloat16,
    scales the loss; it is slow on CPUs."""
    tf32: bool = True
    """float32 products on GPUs may round their inputs to TensorFloat-32, which is several times as fast; false: never.
    What is left in float32 under bfloat16 or float16 is rounded so too."""
    times: Literal["uniform", "early_only", "loss_second_moment"] = "uniform"
    """Noise levels of training: uniform in the schedule's time; only the early times, which have the least noise; or
    steps of a discrete schedule by the second moment of their last losses, each loss weighted so that the mean stays
    the same (less noisy gradients of loss=rescaled_kl)."""
    early_fraction: float = Field(default=0.5, gt=0, le=1)
    """early_only: the part of the times that is visited."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate."""
    ema: EmaConfig = EmaConfig()
    """Moving averages of the weights."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """With several processes: copies of the model, or the model sharded over them."""
    shard_group_size: int | None = Field(default=None, ge=1)
    """fsdp2: processes that share one copy of the model, copies are data parallel; null: all."""
    compile: bool = False
    """torch.compile the network: slow to start, faster steps."""
    channels_last: bool = True
    """Memory order of images and kernels; the faster one nearly everywhere."""
    checkpoint_every_steps: int = Field(default=1000, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = Field(default=5, ge=1)
    """Newest checkpoints to keep."""
    keep_best_checkpoints: int = Field(default=0, ge=0)
    """Checkpoints of the least validation loss to keep beside them."""
    num_validation_samples: int = Field(default=0, ge=0)
    """The last samples of the store, kept out of training."""
    samples: tuple[int, int] | None = None
    """First sample of the store to train on, and the one after the last; null: all but the validation samples."""
    validate_every_steps: int = Field(default=1000, ge=1)
    """Steps between validation losses."""
    similarity_num_steps: tuple[int, ...] = (64,)
    """Sampling steps with which a prior draws the embeddings of the validation samples, whose similarities to the true
    ones are logged; one series of figures for each number."""
    grid_every_steps: int | None = Field(default=None, ge=1)
    """Steps between grids of drawn images; null: none."""
    num_grid_images: int = Field(default=16, ge=1)
    """Images of a grid."""
    grid_num_steps: int = Field(default=25, ge=1)
    """Sampling steps of a grid."""
    grid_guidance: float = Field(default=3.0, ge=0)
    """Guidance by caption, transcription and label of a grid."""
    log_every_steps: int = Field(default=50, ge=1)
    """Steps between lines of metrics."""
    loggers: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)
    """Where metrics go."""
    profile_steps: tuple[int, int] | None = None
    """First and last step to record with torch.profiler, such as [20, 24]; each process writes a Chrome trace to
    OUT/profile. null: none. The recorded steps are slower."""

    @field_validator("horizontal_flip", mode="before")
    @classmethod
    def _half(cls, value: object) -> object:
        return 0.5 if value is True else value

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        self._check_encoders()
        schedule = self.denoiser.diffusion.schedule
        if self.times == "loss_second_moment" and not isinstance(schedule, Discrete):
            raise ValueError(f"times=loss_second_moment needs a discrete schedule (got {schedule.kind})")
        if self.keep_best_checkpoints and not (
            self.num_validation_samples and self.checkpoint_every_steps % self.validate_every_steps == 0
        ):
            raise ValueError(
                f"keep_best_checkpoints is {self.keep_best_checkpoints}: set num_validation_samples, and "
                f"checkpoint_every_steps ({self.checkpoint_every_steps}) to a multiple of validate_every_steps "
                f"({self.validate_every_steps}), so that each checkpoint has a validation loss"
            )
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"profile_steps: first and last step, from 1 (got {list(self.profile_steps)})")
        if self.shard_group_size is not None and self.parallel != "fsdp2":
            raise ValueError("shard_group_size is for parallel=fsdp2")
        if isinstance(self.denoiser, PriorConfig):
            self._check_prior()
        else:
            self._check_images(self.denoiser)
        return self

    def _check_encoders(self) -> None:
        """Refuses encoders that the model does not read, and the lack of those it does."""
        network, prior = self.denoiser.network, isinstance(self.denoiser, PriorConfig)
        name = "network" if prior else "unet"
        if (self.text is None) != (network.text_dim is None):
            raise ValueError(
                f"text is {self.text!r}, but denoiser.{name}.text_dim is {network.text_dim}; set both, or null both"
            )
        if (self.text_embed is not None) != prior:
            raise ValueError(
                f"text_embed is {self.text_embed!r}: a prior reads it (denoiser.kind: prior), and nothing else does"
            )
        reads_image_embed = isinstance(network, PriorNetworkConfig) or network.image_embed_dim is not None
        if (self.image_embed is not None) != reads_image_embed:
            raise ValueError(
                f"image_embed is {self.image_embed!r}: a prior and a decoder with denoiser.unet.image_embed_dim read "
                "it, and nothing else does"
            )

    def _check_prior(self) -> None:
        """Refuses what is for images."""
        if self.num_validation_samples == 1:
            raise ValueError("num_validation_samples: a prior's similarities need 2 samples or more, or 0 (got 1)")
        schedule, steps = self.denoiser.diffusion.schedule, max(self.similarity_num_steps, default=0)
        if self.num_validation_samples and isinstance(schedule, Discrete) and steps > schedule.num_steps:
            raise ValueError(f"similarity_num_steps: {steps} of a schedule of {schedule.num_steps} steps; take fewer")
        for field in ("crop_px", "augment", "low_res_blur", "grid_every_steps"):
            if getattr(self, field) is not None:
                raise ValueError(f"{field} is for images; a prior draws embeddings: null it")
        for field in ("horizontal_flip", "all_dropout", "low_res_grayscale"):
            if getattr(self, field):
                raise ValueError(f"{field} is for images; a prior draws embeddings: leave it off")

    def _check_images(self, denoiser: DenoiserConfig) -> None:
        """Refuses sizes and cuts that do not fit."""
        unet = denoiser.unet
        if unet.condition_channels:
            raise ValueError(
                f"denoiser.unet.condition_channels is {unet.condition_channels}, but no store holds images to look "
                "at; set 0, or write the training loop of such a model in Python"
            )
        if self.crop_px is not None:
            low = denoiser.low_res_px
            if low is None:
                raise ValueError("crop_px is for super-resolution; a base model must see whole images")
            ratio = denoiser.size_px // low
            if denoiser.size_px % low or self.crop_px % ratio or self.crop_px % unet.sides_divisor:
                raise ValueError(
                    f"crop_px {self.crop_px} must be a multiple of size_px / low_res_px = {denoiser.size_px}/{low} "
                    f"and of {unet.sides_divisor}"
                )
            if self.crop_px > denoiser.size_px:
                raise ValueError(f"crop_px {self.crop_px} is larger than size_px {denoiser.size_px}")
            if self.augment is not None:
                raise ValueError("crop_px and augment are two ways to cut an image; null one of them")
        if self.augment is not None and self.augment.from_px < denoiser.size_px:
            raise ValueError(
                f"augment.from_px {self.augment.from_px} is smaller than denoiser.size_px {denoiser.size_px}; name a "
                "larger stored size"
            )
        for field in ("low_res_blur", "low_res_grayscale"):
            if getattr(self, field) and denoiser.low_res_px is None:
                raise ValueError(f"{field} is for super-resolution; a base model has no low-resolution image")

    @property
    def num_classes(self) -> int | None:
        """Classes whose labels the model reads; None: it reads none."""
        return None if isinstance(self.denoiser, PriorConfig) else self.denoiser.unet.num_classes

    @property
    def transcription(self) -> TranscriptionConfig | None:
        """How the model reads the text to be written in an image; None: it does not."""
        return None if isinstance(self.denoiser, PriorConfig) else self.denoiser.unet.transcription

    @property
    def side_px(self) -> int:
        """Side of the images the network sees in training."""
        assert isinstance(self.denoiser, DenoiserConfig)
        return self.crop_px or self.denoiser.size_px
