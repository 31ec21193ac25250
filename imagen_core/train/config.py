"""Everything that decides a training run."""

import os
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from imagen_core.config import Config, default_field
from imagen_core.diffusion import AnyDenoiserConfig, DenoiserConfig, PriorConfig
from imagen_core.diffusion.schedules import Discrete
from imagen_core.models.conditioning.transcription import TranscriptionConfig
from imagen_core.models.prior import PriorNetworkConfig
from imagen_core.store.read.options import layers_by_encoder
from imagen_core.train.alignment.config import AlignmentConfig
from imagen_core.train.components import (
    CheckpointsConfig,
    ComputeConfig,
    ConditioningDropoutConfig,
    DataConfig,
    EmaConfig,
    GridConfig,
    InitFromConfig,
    LoggingConfig,
    NoiseLevelsConfig,
    OptimizerConfig,
    ParallelConfig,
    StoreShare,
    ValidationConfig,
    ViewsConfig,
    store_name,
)
from imagen_core.train.lora.config import LoraConfig


def _place(path: str) -> str:
    """A path or URL in one spelling."""
    return path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))


def _length(value: object) -> int | None:
    """Entries of a list; None of what is none."""
    return len(value) if isinstance(value, tuple) else None


Precision = Literal["float32", "bfloat16", "float16", "float64"]


class TrainConfig(Config):
    """One training run: one stage of a cascade, from one store, or from several by weight."""

    store: str | None = None
    """Folder or fsspec URL of the store; the only thing training reads. null: several `stores`."""
    stores: tuple[StoreShare, ...] = ()
    """Stores to mix by weight, instead of `store`."""
    where: str | None = None
    """Which samples of each store are used, as an SQL condition on kept columns, width, height, label, key and url,
    such as `aesthetic >= 6 and width >= 512`; `data.samples` and `validation.num_samples` count these. null: all."""
    denoiser: AnyDenoiserConfig
    """The model and its diffusion."""
    text: str | tuple[str, ...] | None = None
    """Encoder in the store whose embeddings the model reads; null: not conditioned on captions. A list such as `[t5,
    clip]`: several encoders, whose tokens the model joins; its text_dim is a list too."""
    text_layers: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    """Of an encoder whose layers are stored apart (`join: stack`): the numbers of the layers that are read, as the
    store lists them; the model's num_text_layers says how many. null: all. Of several encoders by name, such as
    `{llm: [9, 18]}`."""
    text_embed: str | None = None
    """Text encoder in the store with one vector per caption: a prior reads it, in a space shared with images, and a
    model with text_embed_dim, beside `text`."""
    image_embed: str | None = None
    """Image encoder in the store: a prior learns to generate its embeddings, a decoder reads them."""
    condition_images: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Arrays of the store that the network reads as further images, with the channels of each, such as `{depth: 1}`:
    uint8 or bool, (height, width) or (height, width, channels), stretched to the size of the network's image. Their
    sum is the model's condition_channels."""
    captions: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    """Weight of each set of captions, such as `{long: 0.8, short: 0.2}`: for each sample a set is chosen by weight,
    then one of its captions. null: the weights that the stores have."""
    max_tokens: int = Field(default=128, ge=1)
    """Longer captions are truncated."""
    num_steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(ge=1)
    """Images per step, over all processes."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Most images of a process at once; gradients are accumulated over the rest. null: all at once."""
    seed: int = Field(default=0, ge=0)
    """Decides weights, order, noise and dropout."""
    precision: Precision = "float32"
    """bfloat16 and float16 compute in it (autocast) and keep float32 weights. float16, for GPUs without bfloat16,
    scales the loss; it is slow on CPUs."""
    init_from: InitFromConfig | None = None
    """Start with the weights of another training; null: with random weights."""
    lora: LoraConfig | None = default_field(None)
    """Train an adapter of the model in `init_from`, whose weights stay as they are; null: train all weights."""
    alignment: AlignmentConfig | None = default_field(None)
    """Align hidden states of the network with patch features of the store; null: do not."""
    self_conditioning_fraction: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the samples whose network is shown its own first estimate, if it has self_conditioning."""
    data: DataConfig = DataConfig()
    """Which samples are read, and how."""
    conditioning_dropout: ConditioningDropoutConfig = ConditioningDropoutConfig()
    """Conditions dropped, so that guidance has models without them."""
    views: ViewsConfig = ViewsConfig()
    """Random views of the images: crops, flips, and changes of low-resolution images."""
    noise_levels: NoiseLevelsConfig = NoiseLevelsConfig()
    """Noise levels of training."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate."""
    ema: EmaConfig = EmaConfig()
    """Moving averages of the weights."""
    parallel: ParallelConfig = ParallelConfig()
    """How several processes share the model."""
    compute: ComputeConfig = ComputeConfig()
    """TF32, torch.compile and memory order."""
    validation: ValidationConfig = ValidationConfig()
    """Validation losses."""
    grid: GridConfig = GridConfig()
    """Grids of images sampled during training."""
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    """When checkpoints are written, and which are kept."""
    logging: LoggingConfig = LoggingConfig()
    """Metrics, and traces of steps."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        self._check_stores()
        self._check_encoders()
        self._check_captions()
        schedule = self.denoiser.diffusion.schedule
        if self.noise_levels.kind == "loss_second_moment" and not isinstance(schedule, Discrete):
            raise ValueError(f"noise_levels.kind=loss_second_moment needs a discrete schedule (got {schedule.kind})")
        self._check_best_checkpoints()
        self._check_lora()
        if isinstance(self.denoiser, PriorConfig):
            self._check_prior()
        else:
            self._check_views(self.denoiser)
        return self

    def _check_stores(self) -> None:
        """Refuses all but either one store, or several that can be told apart and have a share."""
        if self.store is not None and self.stores:
            raise ValueError(f"stores: and store is {self.store!r}; set store=null to mix stores, or leave stores out")
        if self.store is None and not self.stores:
            raise ValueError("store: is missing; name the store to train on, or several as stores")
        if not self.stores:
            return
        if self.data.samples is not None:
            raise ValueError("data.samples: is of one store; set stores.N.samples of each store that needs it")
        for field, values in (
            ("path", [_place(share.path) for share in self.stores]),
            ("name", [share.called for share in self.stores]),
        ):
            twice = [number for number, value in enumerate(values) if value in values[:number]]
            if twice:
                number = twice[0]
                remedy = (
                    "name each store once" if field == "path" else f"give one of them another stores.{number}.name"
                )
                raise ValueError(f"stores.{number}.{field}: {values[number]!r} is there twice; {remedy}")
        if not any(share.weight for share in self.stores):
            raise ValueError("stores: all weights are 0, so there is nothing to train on; give one a weight above 0")

    def _check_captions(self) -> None:
        """Refuses weights of sets of captions that would leave no caption to read, or that nothing reads."""
        of_stores = {f"stores.{number}.captions": share.captions for number, share in enumerate(self.stores)}
        for field, weights in {"captions": self.captions, **of_stores}.items():
            if weights is not None and not any(weights.values()):
                raise ValueError(f"{field}: all weights are 0, so no caption would be read; give one a weight above 0")
            if weights is not None and not self.reads_captions:
                raise ValueError(f"{field}: the model reads no captions; leave it out, or set text and text_dim")

    def _check_encoders(self) -> None:
        """Refuses encoders that the model does not read, and the lack of encoders that it does."""
        network, prior = self.denoiser.network, isinstance(self.denoiser, PriorConfig)
        name = "network" if prior else "unet"
        self._check_tokens(f"denoiser.{name}")
        reads_text_embed = isinstance(network, PriorNetworkConfig) or network.text_embed_dim is not None
        if (self.text_embed is not None) != reads_text_embed:
            raise ValueError(
                f"text_embed is {self.text_embed!r}: a prior reads it (denoiser.kind: prior), and a model with "
                "denoiser.unet.text_embed_dim, and nothing else does"
            )
        reads_image_embed = isinstance(network, PriorNetworkConfig) or network.image_embed_dim is not None
        if (self.image_embed is not None) != reads_image_embed:
            raise ValueError(
                f"image_embed is {self.image_embed!r}: a prior and a decoder with denoiser.unet.image_embed_dim read "
                "it, and nothing else does"
            )

    def _check_tokens(self, model: str) -> None:
        """Refuses encoders of tokens, or layers of them, of another number than the model reads."""
        network = self.denoiser.network
        dims, counts = network.text_dim, network.text_layer_counts
        if (self.text is None) != (dims is None):
            raise ValueError(f"text is {self.text!r}, but {model}.text_dim is {dims}; set both, or null both")
        if _length(self.text) != _length(dims):
            shown = list(dims) if isinstance(dims, tuple) else dims
            raise ValueError(
                f"text is {list(self.text) if isinstance(self.text, tuple) else self.text!r}, but {model}.text_dim is "
                f"{shown}; give one width for one encoder, or a list with the width of each"
            )
        for number, (encoder, layers) in enumerate(self.texts.items()):
            if layers is None:
                continue
            of = f" of {encoder!r}" if isinstance(self.text, tuple) else ""
            option = f"{model}.num_text_layers{f'.{number}' if of else ''}"
            if len(layers) != counts[number]:
                remedy = network.with_layer_count(number, len(layers))
                raise ValueError(
                    f"text_layers{of} are {list(layers)}, but {option} is {counts[number]}; set "
                    + (f"{model}.num_text_layers={remedy}" if of else f"it to {remedy}")
                )
            if len(set(layers)) < len(layers):
                raise ValueError(f"text_layers{of} are {list(layers)}, which names a layer twice; name each once")

    @property
    def texts(self) -> dict[str, Sequence[int] | None]:
        """The encoders of `text` in their order, each with the layers that are read; None: all, or it has none."""
        return layers_by_encoder(self.text, self.text_layers)

    @property
    def reads_captions(self) -> bool:
        """Whether the model reads captions, as tokens or as one vector."""
        return self.text is not None or self.text_embed is not None

    def _check_best_checkpoints(self) -> None:
        """Refuses to keep the best of checkpoints that have no validation loss."""
        every, validated = self.checkpoints.every_steps, self.validation.every_steps
        if self.checkpoints.keep_best and not (self.validation.num_samples and every % validated == 0):
            raise ValueError(
                f"checkpoints.keep_best is {self.checkpoints.keep_best}: set validation.num_samples, and "
                f"checkpoints.every_steps ({every}) to a multiple of validation.every_steps ({validated}), so that "
                "each checkpoint has a validation loss"
            )

    def _check_lora(self) -> None:
        """Refuses an adapter of weights that a resumed training would not find again."""
        if self.lora is not None and self.optimizer.kind == "muon":
            raise ValueError(
                "optimizer.kind: muon orthogonalises whole matrices, and an adapter's are factors of one; use adamw"
            )
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora: is an adapter of a trained model; name it as init_from.path")
        if self.lora is not None and self.init_from is not None and self.init_from.mismatch != "error":
            raise ValueError(
                f"init_from.mismatch: {self.init_from.mismatch} would leave weights random that no checkpoint of an "
                "adapter holds; leave it out, or train all weights with lora=null"
            )

    def _check_prior(self) -> None:
        """Refuses settings that are for images."""
        if self.validation.num_samples == 1:
            raise ValueError("validation.num_samples: a prior's similarities need 2 samples or more, or 0 (got 1)")
        schedule, steps = self.denoiser.diffusion.schedule, max(self.validation.similarity_num_steps, default=0)
        if self.validation.num_samples and isinstance(schedule, Discrete) and steps > schedule.num_steps:
            raise ValueError(
                f"validation.similarity_num_steps: {steps} of a schedule of {schedule.num_steps} steps; take fewer"
            )
        views = self.views
        if self.alignment is not None:
            raise ValueError("alignment: a prior has no patches of images; leave it out")
        if self.condition_images:
            raise ValueError("condition_images: a prior reads no images; leave it out")
        for field, value in (
            ("views.crop_px", views.crop_px),
            ("views.resized_crop", views.resized_crop),
            ("views.low_res_blur", views.low_res_blur),
            ("views.low_res_jpeg", views.low_res_jpeg),
            ("views.low_res_tint", views.low_res_tint),
            ("grid.every_steps", self.grid.every_steps),
        ):
            if value is not None:
                raise ValueError(f"{field} is for images; a prior generates embeddings: null it")
        for field, value in (
            ("views.horizontal_flip", views.horizontal_flip),
            ("views.low_res_grayscale", views.low_res_grayscale),
            ("conditioning_dropout.all", self.conditioning_dropout.all),
        ):
            if value:
                raise ValueError(f"{field} is for images; a prior generates embeddings: leave it off")

    def _check_views(self, denoiser: DenoiserConfig) -> None:
        """Refuses sizes and crops that do not fit the model."""
        unet, views = denoiser.unet, self.views
        if sum(self.condition_images.values()) != unet.condition_channels:
            raise ValueError(
                f"denoiser.unet.condition_channels is {unet.condition_channels}, but condition_images are "
                f"{self.condition_images}; set it to the sum of their channels, and name arrays of the store"
            )
        for field in ("crop_px", "resized_crop", "horizontal_flip") if self.condition_images else ():
            if getattr(views, field):
                raise ValueError(f"views.{field}: would not change the condition_images with the image; leave it off")
        for field in ("crop_px", "resized_crop") if self.alignment is not None else ():
            if getattr(views, field) is not None:
                raise ValueError(f"views.{field}: alignment reads features of whole images; null one of them")
        if views.crop_px is not None:
            self._check_crop(denoiser, views.crop_px)
        if views.resized_crop is not None and views.resized_crop.from_px < denoiser.size_px:
            raise ValueError(
                f"views.resized_crop.from_px {views.resized_crop.from_px} is smaller than denoiser.size_px "
                f"{denoiser.size_px}; name a larger stored size"
            )
        for field in ("low_res_blur", "low_res_grayscale", "low_res_jpeg", "low_res_tint"):
            if getattr(views, field) and denoiser.low_res_px is None:
                raise ValueError(f"views.{field} is for super-resolution; a base model has no low-resolution image")

    def _check_crop(self, denoiser: DenoiserConfig, crop_px: int) -> None:
        """Refuses a side that does not fit the model."""
        low, divisor = denoiser.low_res_px, denoiser.unet.sides_divisor
        if low is None:
            raise ValueError("views.crop_px is for super-resolution; a base model must see full images")
        ratio = denoiser.size_px // low
        if denoiser.size_px % low or crop_px % ratio or crop_px % divisor:
            raise ValueError(
                f"views.crop_px {crop_px} must be a multiple of size_px / low_res_px = {denoiser.size_px}/{low} "
                f"and of {divisor}"
            )
        if crop_px > denoiser.size_px:
            raise ValueError(f"views.crop_px {crop_px} is larger than size_px {denoiser.size_px}")
        if self.views.resized_crop is not None:
            raise ValueError("views.crop_px and views.resized_crop are two ways to crop an image; null one of them")

    def by_store(self) -> dict[str, "TrainConfig"]:
        """This training as that of each of its stores alone, by the store's name."""
        if self.store is not None:
            return {store_name(self.store): self}
        found = {}
        for share in self.stores:
            data = self.data.model_copy(update={"samples": share.samples})
            captions = self.captions if share.captions is None else share.captions
            changes = {"store": share.path, "stores": (), "data": data, "captions": captions}
            found[share.called] = self.model_copy(update=changes)
        return found

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each store by its name."""
        if self.store is not None:
            return {store_name(self.store): 1.0}
        return {share.called: share.weight for share in self.stores}

    @property
    def shares(self) -> dict[str, float]:
        """The part of the samples that comes from each store, 0..1, by its name."""
        weights = self.weights
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    @property
    def num_classes(self) -> int | None:
        """Number of classes whose labels the model reads; None if it reads none."""
        return None if isinstance(self.denoiser, PriorConfig) else self.denoiser.unet.num_classes

    @property
    def transcription(self) -> TranscriptionConfig | None:
        """How the model reads the text to be written in an image; None if it does not."""
        return None if isinstance(self.denoiser, PriorConfig) else self.denoiser.unet.transcription

    @property
    def side_px(self) -> int:
        """Side of the images the network sees in training."""
        assert isinstance(self.denoiser, DenoiserConfig)
        return self.views.crop_px or self.denoiser.size_px
