"""The components of a training's configuration; `TrainConfig` puts them together."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from imagen_core.config import Config, default_field
from imagen_core.store import DEFAULT_CACHE_BYTES
from imagen_core.train.augment import BlurConfig, JpegConfig, ResizedCropConfig, TintConfig


class DataConfig(Config):
    """Which samples of the store are read, and how."""

    samples: tuple[int, int] | None = None
    """First sample of the store to train on, and the one after the last; null: all but the validation samples. In a
    mixture each store has its own `samples`."""
    shuffle_window_shards: int | None = Field(default=None, ge=1)
    """Shards come in random order, and samples are shuffled within this many of them; null: all samples are shuffled
    with each other."""
    replacement: bool = False
    """Draw samples with replacement, each independently of the others; an epoch is as many as the store has. With
    shuffle_window_shards, and in stores of aspect-ratio buckets, within each window and bucket. false: each sample
    comes once per epoch."""
    cache_dir: str | None = None
    """Local folder for checked copies of a remote store's files, shared by the processes of a machine; null: no
    copies."""
    cache_bytes: int = Field(default=DEFAULT_CACHE_BYTES, ge=1)
    """Most bytes of cache_dir; the least recently used files are removed."""

    @field_validator("cache_dir")
    @classmethod
    def _check_is_local(cls, folder: str | None) -> str | None:
        if folder is not None and "://" in folder:
            raise ValueError("is a URL, and only a local path works here; give a folder of this machine's disk")
        return folder


def store_name(path: str) -> str:
    """What a store is called by its path: the last part, or the one before it in RUN/store."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    last = parts[-1] if parts else path
    return parts[-2] if last == "store" and len(parts) > 1 else last


class StoreShare(Config):
    """One store of a mixture."""

    path: str = Field(min_length=1)
    """Folder or fsspec URL of the store."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Its share of the samples is this, divided by the sum of all weights. 0: only its validation samples are read."""
    name: str | None = Field(default=None, min_length=1)
    """Names it in metrics and checkpoints, and must stay the same; null: the last part of path, or the one before it
    where that is `store`."""
    samples: tuple[int, int] | None = None
    """First sample of the store to train on, and the one after the last; null: all but the validation samples."""
    captions: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    """Weight of each of the store's sets of captions, instead of the training's `captions`; null: those."""

    @property
    def called(self) -> str:
        """The store's name."""
        return store_name(self.path) if self.name is None else self.name


class InitFromConfig(Config):
    """Weights of another training to start with, instead of random ones."""

    path: str = Field(min_length=1)
    """Run folder or checkpoint folder of the other training, or a file of `pipeline export`."""
    weights: str | None = None
    """Which of its weights: `model`, an average such as `ema-0.9999`, or one rebuilt from snapshots such as
    `power-0.07`; null: the slowest average."""
    mismatch: Literal["error", "skip", "grow"] = "error"
    """Tensors that only one of the two models has, or that differ in shape: refuse; skip: leave them random; grow: as
    skip, but a smaller tensor becomes the first part of the larger one. Its outputs read nothing new, and what is new
    is initialised as ever: more channels in or out, classes, and a larger first kernel leave the function as it was;
    wider layers and embeddings do not, as norms mix their channels."""


class ConditioningDropoutConfig(Config):
    """Fractions of the conditions dropped in training, so that guidance has models without them.

    Each is sampled independently of the others, and matters only to a model that reads the condition.
    """

    text: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the captions dropped."""
    transcription: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the transcriptions dropped."""
    labels: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the class labels dropped."""
    image_embed: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the image embeddings dropped; for a prior, of the noisy ones it sees."""
    all: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the images whose captions, transcriptions, labels and embeddings are dropped together, in addition
    to what is dropped of each."""


class ViewsConfig(Config):
    """Random views of the images: crops, flips, and changes of low-resolution images."""

    crop_px: int | None = Field(default=None, ge=1)
    """Train super-resolution on random crops of this side; null: on full images."""
    resized_crop: ResizedCropConfig | None = None
    """Train on random crops of a larger stored size, resized; null: on full images, or on crops of crop_px."""
    horizontal_flip: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the images to flip; true is half. Images that are known to show writing are never flipped.
    Wrong where captions tell left from right."""
    low_res_blur: BlurConfig | None = None
    """Blur some of the low-resolution images, in training only; null: none."""
    low_res_grayscale: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the low-resolution images shown in grayscale; 1 makes a model that colours images."""
    low_res_jpeg: JpegConfig | None = None
    """Compress some of the low-resolution images as JPEG, in training only; null: none."""
    low_res_tint: TintConfig | None = None
    """Show some of the low-resolution images in shades of one colour, in training only; null: none."""

    @field_validator("horizontal_flip", mode="before")
    @classmethod
    def _half(cls, value: object) -> object:
        return 0.5 if value is True else value


class NoiseLevelsConfig(Config):
    """Noise levels of training."""

    kind: Literal["uniform", "early_only", "loss_second_moment"] = "uniform"
    """uniform: uniform in the schedule's time; early_only: only the early times, which have the least noise;
    loss_second_moment: steps of a discrete schedule by the second moment of their last losses, each loss weighted so
    that the mean stays the same (less noisy gradients of loss=rescaled_kl)."""
    early_fraction: float = Field(default=0.5, gt=0, le=1)
    """early_only: the fraction of the times that is visited."""


class ParameterGroup(Config):
    """Parameters with their own settings."""

    match: str = Field(min_length=1)
    """Regular expression for the beginning of a parameter's name, e.g. `net\\.inputs\\.text`; a parameter belongs to
    the first group that matches."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate after warm-up, which follows the schedule of the others; null: the optimizer's."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of matrices and kernels; null: the optimizer's."""
    optimizer: Literal["adamw", "muon"] | None = default_field(None)
    """With kind=muon: muon for all matrices and kernels of the group, or adamw for all of it; null: as the rule of
    kind says."""

    @model_validator(mode="after")
    def _check(self) -> "ParameterGroup":
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match: {self.match!r} is no regular expression ({error})") from error
        return self


class MuonConfig(Config):
    """Muon (Jordan et al. 2024), as torch computes it: the momentum of each matrix, orthogonalised."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the running mean of gradients (Nesterov's)."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Multiplies the learning rate of an (m, n) matrix: match_rms_adamw, by 0.2 sqrt(max(m, n)), so that updates are
    as large as AdamW's, and its learning rate and decay serve both (Liu et al. 2025, arXiv 2502.16982); original, by
    sqrt(max(1, m / n))."""
    kernels: bool = False
    """Muon for the kernels of convolutions in blocks too, each as a matrix of outputs x (inputs and pixels); most
    weights of a UNet are in these."""


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019), or Muon and AdamW, and the learning rate over time."""

    kind: Literal["adamw", "muon"] = default_field("adamw")
    """muon: Muon for the matrices of linear layers in the network's blocks, AdamW for the rest: convolutions (but see
    muon.kernels), norms, biases, embeddings, and all before the first and behind the last block."""
    muon: MuonConfig = default_field(MuonConfig())
    """kind=muon: Muon's settings."""
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
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """Learning rate after warm-up; wsd (warmup-stable-decay): constant, and a decay over the last steps alone. The
    checkpoint before that decay is written and stays, so that the training can be continued from there."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Step at which the decay of cosine and wsd ends; null: num_steps."""
    decay_fraction: float = default_field(0.2, gt=0, le=1)
    """wsd: part of the steps up to the end of the decay that it takes."""
    decay_shape: Literal["linear", "one_minus_sqrt"] = default_field("linear")
    """wsd: the decay over its part p = 0..1: 1 - p, or 1 - sqrt(p) (Hägele et al. 2024, arXiv 2405.18392)."""
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end of the decay, as a fraction of lr."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters with another learning rate or weight decay, by name."""
    on_cpu: bool = default_field(False)
    """Keep Adam's moments in main memory: frees 8 bytes per parameter on the GPU, and each step copies 16 bytes per
    parameter. The numbers are the same."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas: each must be in [0, 1) (got {beta})")
        if self.kind != "muon":
            named = [number for number, group in enumerate(self.groups) if group.optimizer is not None]
            if named or self.muon != MuonConfig():
                option = f"groups.{named[0]}.optimizer" if named else "muon"
                raise ValueError(f"{option}: is for kind=muon (got kind={self.kind}); leave it out, or set kind=muon")
        elif self.on_cpu:
            raise ValueError("on_cpu: is for kind=adamw; Muon's momentum, 4 bytes per parameter, stays on the device")
        return self


class EmaConfig(Config):
    """Moving averages of the weights, float32."""

    rates: tuple[float, ...] = (0.9999,)
    """Decay of each average. All start as the plain mean of the weights so far, until the decay is reached."""
    every_steps: int = Field(default=1, ge=1)
    """Steps between updates."""
    profiles: tuple[Annotated[float, Field(gt=0, le=0.28)], ...] = default_field(())
    """Further averages, of power-function profiles (Karras et al. 2024, arXiv 2312.02696): the standard deviation of
    each as a part of the training so far, sigma_rel, at most 0.28. From snapshots of two, such as [0.05, 0.1], any
    length about them is rebuilt after the training, as weights `power-0.07`."""
    snapshot_every_steps: int | None = default_field(None, ge=1)
    """Steps between snapshots of `profiles`, which all stay, in OUT/snapshots; the last step has one too. Each takes 2
    bytes per parameter and profile; 20 to 100 in a training are enough."""
    on_cpu: bool = False
    """Keep them in main memory: frees 4 bytes per parameter and average on the GPU, and each update copies the
    weights. Set every_steps to 10 or so to make it cheap."""

    @model_validator(mode="after")
    def _check(self) -> "EmaConfig":
        for rate in self.rates:
            if not 0 <= rate < 1:
                raise ValueError(f"rates: each must be in [0, 1) (got {rate})")
        if len(set(self.rates)) != len(self.rates):
            raise ValueError(f"rates: each once (got {self.rates})")
        if len(set(self.profiles)) != len(self.profiles):
            raise ValueError(f"profiles: each once (got {self.profiles})")
        if bool(self.profiles) != (self.snapshot_every_steps is not None):
            raise ValueError(
                f"profiles are {list(self.profiles)} and snapshot_every_steps is {self.snapshot_every_steps}: set both"
                ", or neither"
            )
        return self


class ParallelConfig(Config):
    """How several processes share the model."""

    kind: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: each process has a copy of the model; fsdp2: the model is sharded over the processes."""
    shard_group_size: int | None = Field(default=None, ge=1)
    """fsdp2: processes that share one copy of the model, copies are data parallel; null: all."""

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.shard_group_size is not None and self.kind != "fsdp2":
            raise ValueError("shard_group_size is for parallel.kind=fsdp2")
        return self


class ComputeConfig(Config):
    """How the device computes; changes speed, not the training."""

    tf32: bool = True
    """float32 products on GPUs may round their inputs to TensorFloat-32, which is several times as fast; false: never.
    What is left in float32 under bfloat16 or float16 is rounded so too."""
    compile: bool = False
    """torch.compile the network: slow to start, faster steps."""
    step_limit_s: float | None = Field(default=None, gt=0)
    """Most seconds of a step, with the wait for its batch and for other processes: a process that takes longer, as
    where a disk or the network hangs, prints where it is and ends with exit code 75, to be started again from the
    newest checkpoint. The first step of a start, validation, grids and checkpoints have no limit. null: none."""
    channels_last: bool = True
    """Memory order of images and kernels; the faster one nearly everywhere."""
    cudnn_autotune: bool = default_field(False)
    """cuDNN measures its convolutions at the first step of each shape, and takes the fastest. Which one that is may
    change from start to start, so a resumed training is then not the same to the last bit."""


class ValidationConfig(Config):
    """Validation losses on samples kept out of training."""

    num_samples: int = Field(default=0, ge=0)
    """The last samples of the store, or of each store of a mixture, kept out of training; 0 disables validation."""
    every_steps: int = Field(default=1000, ge=1)
    """Steps between validation losses."""
    similarity_num_steps: tuple[int, ...] = (64,)
    """Sampling steps with which a prior generates the embeddings of the validation samples, whose similarities to the
    true ones are logged; one series of metrics for each number."""


class GridConfig(Config):
    """Grids of images sampled during training."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between grids; null disables them."""
    num_images: int = Field(default=16, ge=1)
    """Images per grid."""
    num_steps: int = Field(default=25, ge=1)
    """Sampling steps."""
    guidance: float = Field(default=3.0, ge=0)
    """Guidance by caption, transcription and label."""


class CheckpointsConfig(Config):
    """When checkpoints are written, and which are kept."""

    every_steps: int = Field(default=1000, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep: int = Field(default=5, ge=1)
    """Newest checkpoints to keep."""
    keep_best: int = Field(default=0, ge=0)
    """Checkpoints of the least validation loss to keep in addition to the newest."""


class LoggingConfig(Config):
    """Metrics, and traces of steps."""

    every_steps: int = Field(default=50, ge=1)
    """Steps between lines of metrics."""
    loggers: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)
    """Where metrics go."""
    profile_steps: tuple[int, int] | None = None
    """First and last step to record with torch.profiler, such as [20, 24]; each process writes a Chrome trace to
    OUT/profile. null: none. The recorded steps are slower."""

    @model_validator(mode="after")
    def _check(self) -> "LoggingConfig":
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"profile_steps: first and last step, from 1 (got {list(self.profile_steps)})")
        return self
