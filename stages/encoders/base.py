"""What an encoder is: the settings that all encoders share, those of text encoders, and those of image encoders."""

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

import numpy as np
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import ConfigError, MachineError
from pipeline.executors.base import usable_cpus
from pipeline.storage.scratch import temporary_folder
from stages.captions import NORMALISATION, on_one_line
from stages.encoders.batches.model_input import CaptionReader, ModelInput
from stages.encoders.identity import acting_settings, identity_changes, tokenizer_settings
from stages.encoders.model_files import ModelFiles, check_headers, find_model
from stages.encoders.tiny import TINY_MODEL, write_tiny_model
from stages.images.resample import center_square, resize_square

if TYPE_CHECKING:
    from torch import Tensor

POOLED = ("pooled", "projected")
"""Outputs of one vector per caption."""

_IDENTITY = frozenset(("name", "kind", "model", "revision"))
"""Fields that say which encoder it is."""

FloatArray = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Embeddings of some captions or images, in their order."""

    embeddings: list[FloatArray]
    """float32 (num_tokens, dim) each; num_tokens counts start and end tokens, is 1 for a pooled output or an image,
    differs by caption, and is 0 if the tokenizer leaves nothing of a caption."""
    num_truncated: int = 0
    """Captions longer than max_tokens; they were truncated and keep their end-of-sequence token."""
    waited_s: float = 0.0
    """Seconds spent waiting for another thread to finish with the model."""
    oom_halvings: int = 0
    """How often a batch did not fit into memory; each time the batch size was halved."""
    num_unknown: int = 0
    """Rows from text that the tokenizer's vocabulary lacks: its `<unk>` tokens, or for a pooled output the captions
    with one."""

    def oom_counter(self) -> dict[str, float]:
        """For the record of a shard in which a batch did not fit."""
        return {"oom_halvings": self.oom_halvings} if self.oom_halvings else {}


@dataclass(frozen=True, slots=True)
class EncoderWorkload:
    """What an encoder would have to do for some captions."""

    tokens: list[int]
    """Rows of each caption as they would be stored: its tokens, or 1 for a pooled output."""
    flops: float
    """FLOPs of the matrix products, without padding; a multiply-add is two."""
    most_tokens: int
    """Rows of the longest caption there can be."""


class TokenModel(Protocol):
    """A loaded text model: takes captions concatenated into one row, returns their states concatenated."""

    padded: bool
    """Whether a batch costs as much as if each of its captions were as long as the longest."""
    pooled: bool
    """Whether a caption has one row in the result, instead of one per token."""

    def __call__(self, ids: "Tensor", lengths: Sequence[int]) -> "Tensor":
        """int64 (total,) and the number of tokens of each caption -> (rows, dim)."""
        ...


@dataclass(frozen=True, slots=True)
class EncoderIdentity:
    """What is known of an encoder without loading it."""

    dim: int
    fingerprint: dict[str, object]
    """Everything that decides the embeddings: model, revision, weights and tokenizer hashes, and those settings of the
    configuration, of config.json and of the tokenizer that act."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers that lie one after another in a row, equally wide; empty where a row has one, or mixes
    them."""
    stacked: bool = False
    """Whether these layers are to be stored apart."""


class FrozenModelConfig(Config):
    """A frozen model that workers keep: where it is, and what a worker may use.

    Every field that a subclass adds is part of the fingerprint, unless `machine_fields` names it.
    """

    machine_fields: ClassVar[frozenset[str]] = frozenset(
        ("num_gpus", "num_cpus", "workers", "resources", "cpu_threads")
    )
    """Fields that change where and how fast the model runs, but not its embeddings."""
    modules: ClassVar[tuple[str, ...]] = (
        "torch",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
    )
    """Large modules that loading the model imports; see `Stage.modules`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the store's group."""
    kind: str
    model: str
    """Hub id (`google/t5-v1_1-xxl`), local folder, or `tiny-random-t5` (built in, no download, for tests)."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    output: str
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of weights and activations. T5-XXL overflows in float16, so that is not offered."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs of one worker, also a fraction. null: one if there are any; 0: run on the CPU."""
    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs reserved for a GPU worker."""
    workers: int | None = Field(default=None, ge=1)
    """Workers that hold the model; null: one for each GPU, or one."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Ray resources of the cluster that a worker requests in addition to CPU and GPU, as
    `{"accelerator_type:H100": 0.001}`: puts it on the nodes that have it. Ignored without --address."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """Threads of a worker that runs on the CPU; null: the number of CPUs divided by the number of workers."""

    @abstractmethod
    def dim(self, files: ModelFiles) -> int:
        """Width of the embeddings.

        Raises:
            ConfigError: the model is of another kind, or not made for such input.
        """

    def joined_layers(self, files: ModelFiles) -> tuple[tuple[int, ...], bool]:
        """`layers` and `stacked` of the identity.

        Raises:
            ConfigError: a layer cannot be stored.
        """
        return (), False

    @abstractmethod
    def input_settings(self, files: ModelFiles) -> dict[str, object]:
        """How captions or images become the model's input, as its files say; for the fingerprint."""

    @classmethod
    def embedding_fields(cls) -> frozenset[str]:
        """Fields that decide the embeddings, in addition to the model."""
        return frozenset(cls.model_fields) - cls.machine_fields - _IDENTITY

    def recorded_fields(self) -> Mapping[str, object]:
        """The values of `embedding_fields` for the fingerprint."""
        return self.model_dump(mode="json", include=set(self.embedding_fields()))

    @classmethod
    def from_fingerprint(
        cls, name: str, fingerprint: Mapping[str, Any], *, model: str | None = None, **machine: object
    ) -> Self:
        """The configuration that a fingerprint was made from.

        Args:
            model: where the model is now (hub id or folder), if not where its name says.
            machine: values of `machine_fields`; a fingerprint has none of them.
        """
        found = {
            "model": model or fingerprint["model"],
            "revision": None if model else fingerprint["revision"],
            **{field: fingerprint[field] for field in cls.embedding_fields() if field in fingerprint},
        }
        return cls.model_validate({"name": name, "kind": fingerprint["kind"], **found, **machine})

    def identify(self) -> EncoderIdentity:
        """Finds the model and its hashes without loading it.

        Raises:
            ConfigError: the model is of another kind, or lacks what the settings need.
            MachineError: it cannot be found, or is damaged.
        """
        with self.located() as files:
            check_headers(files)
            dim, (layers, stacked) = self.dim(files), self.joined_layers(files)
            return EncoderIdentity(
                dim=dim,
                layers=layers,
                stacked=stacked,
                fingerprint={
                    **files.identity,
                    "kind": self.kind,
                    **self.recorded_fields(),
                    **self.input_settings(files),
                    "model_config": acting_settings(files.config),
                },
            )

    def pinned(self, identity: EncoderIdentity) -> Self:
        """The same model for any worker: a local folder by its absolute path, a hub model by its commit."""
        if Path(self.model).is_dir():
            return self.model_copy(update={"model": str(Path(self.model).absolute())})
        return self.model_copy(update={"revision": identity.fingerprint["revision"]})

    def check_unchanged(self, planned: Mapping[str, object]) -> None:
        """Checks in the worker that it finds the driver's model: on another node, or later, it may be another one.

        Raises:
            MachineError: with the differences.
        """
        changes = identity_changes(planned, self.identify().fingerprint)
        if changes:
            raise MachineError(
                f"encoders.{self.name}: this worker finds another model than the run started with: "
                f"{'; '.join(changes)}; put the same files on every node, or start a new run"
            )

    def threads(self) -> int:
        """CPU threads of one worker."""
        return self.cpu_threads or max(1, usable_cpus() // (self.workers or 1))

    @contextmanager
    def located(self) -> Iterator[ModelFiles]:
        """The model's files; the built-in model exists as a folder for as long as it is needed."""
        if self.model != TINY_MODEL:
            yield find_model(self.model, self.revision)
            return
        with temporary_folder() as parent:
            folder = parent / TINY_MODEL
            write_tiny_model(folder)
            yield find_model(str(folder), None)


class EncoderConfig(FrozenModelConfig):
    """Settings of a text encoder, whatever its kind."""

    machine_fields = FrozenModelConfig.machine_fields | {"tokens_per_batch"}

    max_tokens: int = Field(default=128, ge=2)
    """Longest caption in tokens, start and end tokens included; longer ones are truncated and counted."""
    tokens_per_batch: int | None = Field(default=None, ge=1)
    """Tokens in one batch of the model; null: 4096 on a CPU (512 is as fast within 10 %), 16384 on a GPU."""

    @abstractmethod
    def build(self, files: ModelFiles, dtype: Any, device: Any) -> TokenModel:
        """Loads the weights.

        Raises:
            MachineError: they cannot be read, or some are missing.
        """

    @abstractmethod
    def flops(self, files: ModelFiles, lengths: Sequence[int]) -> float:
        """FLOPs of captions with these numbers of tokens, without padding, from config.json; a multiply-add is two."""

    def workload(self, captions: Sequence[str]) -> EncoderWorkload:
        """Counts tokens and FLOPs with the tokenizer and config.json alone; no weights are read.

        Raises:
            MachineError: the model cannot be found, or its tokenizer not be read.
        """
        from stages.encoders.batches.tokens import load_tokenizer

        with self.located() as files, reading(self):
            read = self.reader(load_tokenizer(files))
            inputs, shared = read(captions)[0], self.shared_start(files, read)
            rows = [1 if self.output in POOLED else each.num_rows for each in inputs]
            most = 1 if self.output in POOLED else max(self.max_tokens, *rows, 0)
            flops = self.flops(files, [len(each.ids) for each in inputs])
            if shared:
                flops -= self.flops(files, [len(shared) for each in inputs if each.begins_with(shared)])
            return EncoderWorkload(rows, flops, most)

    def shared_start(self, files: ModelFiles, read: CaptionReader) -> list[int]:
        """Tokens that captions begin with and that the model runs once for all of them."""
        return []

    def reader(self, tokenizer: Any) -> CaptionReader:
        """What turns captions into the model's input: the tokens of their text on one line, and nothing else."""
        from stages.encoders.batches.tokens import tokenize

        def read(captions: Sequence[str]) -> tuple[list[ModelInput], int]:
            texts = [on_one_line(caption) for caption in captions]
            token_ids, num_truncated = tokenize(tokenizer, texts, self.max_tokens)
            return [ModelInput(ids) for ids in token_ids], num_truncated

        return read

    def input_settings(self, files: ModelFiles) -> dict[str, object]:
        if files.tokenizer_sha256 is None:
            raise MachineError(
                f"encoders.model: {self.model}: no tokenizer files (tokenizer.json or spiece.model) next to the model"
            )
        from stages.encoders.batches.tokens import empty_token, load_tokenizer

        with reading(self):
            tokenizer = load_tokenizer(files)
            settings = tokenizer_settings(tokenizer, empty_token(tokenizer))
            own = self.reading_settings(tokenizer)
        return {
            "tokenizer_sha256": files.tokenizer_sha256,
            "text_normalisation": NORMALISATION,
            "tokenizer": settings,
            **own,
        }

    def reading_settings(self, tokenizer: Any) -> Mapping[str, object]:
        """What else of the tokenizer decides how captions are read; for the fingerprint."""
        return {}

    def check_positions(self, positions: int | None) -> None:
        """Refuses captions longer than the model's table of positions.

        Raises:
            ConfigError: with both numbers.
        """
        if positions is not None and self.max_tokens > positions:
            raise ConfigError(
                f"encoder {self.name}: max_tokens is {self.max_tokens}, but {self.model} takes at most {positions} "
                f"tokens; set its max_tokens to {positions} or less"
            )


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The images a model was trained on: side in pixels, mean and standard deviation of the channels in [0, 1]."""

    size_px: int
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def read(cls, path: Path, size_px: int) -> "Preprocessing":
        """What a preprocessor_config.json says; CLIP's values if there is none."""
        if not path.is_file():
            return cls(size_px)
        settings = json.loads(path.read_text(encoding="utf-8"))
        named = {"mean": settings.get("image_mean"), "std": settings.get("image_std")}
        return cls(size_px, **{name: tuple(value) for name, value in named.items() if value is not None})

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """The centre square of uint8 RGB (height, width, 3) as the model expects it: float32 (3, size_px, size_px)."""
        pixels = center_square(pixels)
        if len(pixels) != self.size_px:
            pixels = resize_square(pixels, self.size_px)
        return self.normalize(pixels)

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 RGB (height, width, 3) -> float32 (3, height, width) in the model's range."""
        scaled = pixels.astype(np.float32) / 255
        return ((scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)).transpose(2, 0, 1)


class ImageModelConfig(FrozenModelConfig):
    """Settings of a model of images, whatever its kind."""

    machine_fields = FrozenModelConfig.machine_fields | {"batch_size"}

    batch_size: int = Field(default=64, ge=1)
    """Images in one batch of the model."""

    @abstractmethod
    def preprocessing(self, files: ModelFiles) -> Preprocessing:
        """How the model expects its images."""

    @abstractmethod
    def build(self, files: ModelFiles, dtype: Any, device: Any) -> "Callable[[Tensor], Tensor]":
        """Loads the weights; the result maps prepared images (batch, 3, size_px, size_px) to (batch, dim).

        Raises:
            MachineError: they cannot be read, or some are missing.
        """

    def input_settings(self, files: ModelFiles) -> dict[str, object]:
        preprocessing = self.preprocessing(files)
        return {"image_px": preprocessing.size_px, "mean": list(preprocessing.mean), "std": list(preprocessing.std)}


class ImageEncoderConfig(ImageModelConfig):
    """Settings of an image encoder that is applied to images of the store, whatever its kind."""

    from_px: int = Field(ge=1)
    """Size of the stored images that it encodes; nothing is lost if it is the model's own (224 for ViT-L/14)."""


@contextmanager
def reading(config: FrozenModelConfig) -> Iterator[None]:
    """Turns whatever the loaders raise for damaged files, which is almost anything, into a MachineError."""
    try:
        yield
    except (ConfigError, MachineError):
        raise
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise MachineError(f"encoders.model: {config.model} cannot be loaded: {words}") from error


def refuse_kind(model: str, files: ModelFiles, wanted: str, remedy: str) -> ConfigError:
    """The error for a model of another kind than configured."""
    found = files.config.get("model_type")
    return ConfigError(f"encoders.model: {model} is no {wanted} (model_type {found!r} in config.json); {remedy}")
