"""What a text encoder is, and the settings that all of them share."""

import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self

import numpy as np
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import ConfigError, MachineError
from pipeline.executors.base import usable_cpus
from pipeline.fingerprint import differences
from stages.captions import NORMALISATION
from stages.encoders.model_files import ModelFiles, find_model
from stages.encoders.tiny import TINY_MODEL, write_tiny_model

if TYPE_CHECKING:
    from torch import Tensor

POOLED = ("pooled", "projected")
"""Outputs of one vector a caption."""

FloatArray = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Embeddings of some captions or images, in their order."""

    embeddings: list[FloatArray]
    """float32 (num_tokens, dim) each; num_tokens counts start and end tokens, is 1 for a pooled output or an image,
    and differs by caption."""
    num_truncated: int = 0
    """Captions longer than max_tokens; they were cut and keep their end-of-sequence token."""
    waited_s: float = 0.0
    """Seconds spent waiting for another thread to be done with the model."""
    oom_halvings: int = 0
    """How often a batch did not fit into memory; each time the size of a batch was halved."""

    def oom_counter(self) -> dict[str, float]:
        """For the record, of a shard where a batch did not fit."""
        return {"oom_halvings": self.oom_halvings} if self.oom_halvings else {}


@dataclass(frozen=True, slots=True)
class EncoderWorkload:
    """What an encoder would have to do for some captions."""

    tokens: list[int]
    """Rows of each caption as they would be stored: its tokens, or 1 for a pooled output."""
    flops: float
    """Of the matrix products, without padding; a multiply-add is two."""


class TokenModel(Protocol):
    """A loaded model behind one interface: captions laid end to end in, states laid end to end out."""

    padded: bool
    """Whether a batch costs its longest caption times its captions."""
    pooled: bool
    """Whether a caption has one row in the result, instead of one a token."""

    def __call__(self, ids: "Tensor", lengths: Sequence[int]) -> "Tensor":
        """int64 (total,) and the tokens of each caption -> (rows, dim)."""
        ...


@dataclass(frozen=True, slots=True)
class EncoderIdentity:
    """What is known of an encoder without loading it."""

    dim: int
    fingerprint: dict[str, object]
    """Everything that decides the embeddings: model, revision, weights and tokenizer hashes, length, dtype."""


class FrozenModelConfig(Config):
    """A frozen model that workers keep: where it is, and what a worker may use."""

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
    """Ray resources of the cluster that a worker asks for beside CPU and GPU, as `{"accelerator_type:H100": 0.001}`:
    puts it on the nodes that have it. Ignored without --address."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """Threads of a worker that runs on the CPU; null: all CPUs divided by the workers."""

    @abstractmethod
    def dim(self, files: ModelFiles) -> int:
        """Width of the embeddings.

        Raises:
            MachineError: the model is of another kind, or not made for such input.
        """

    @abstractmethod
    def settings(self, files: ModelFiles) -> dict[str, object]:
        """What decides the embeddings beside the model, its type and output; for the fingerprint."""

    def identify(self) -> EncoderIdentity:
        """Finds the model and its hashes without loading it.

        Raises:
            MachineError: the model cannot be found, is of another kind, or not made for such input.
        """
        with self.located() as files:
            return EncoderIdentity(
                dim=self.dim(files),
                fingerprint={
                    **files.identity,
                    "kind": self.kind,
                    "compute_dtype": self.compute_dtype,
                    "output": self.output,
                    **self.settings(files),
                },
            )

    def pinned(self, identity: EncoderIdentity) -> Self:
        """The same model for any worker: a local folder by its full path, a hub model by its commit."""
        if Path(self.model).is_dir():
            return self.model_copy(update={"model": str(Path(self.model).absolute())})
        return self.model_copy(update={"revision": identity.fingerprint["revision"]})

    def check_unchanged(self, planned: Mapping[str, object]) -> None:
        """The worker must see the model that the driver has seen: another node, or a later moment, may not.

        Raises:
            MachineError: with the differences.
        """
        changes = differences(dict(planned), self.identify().fingerprint)
        if changes:
            raise MachineError(
                f"encoders.{self.name}: this worker finds another model than the run began with: "
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
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / TINY_MODEL
            write_tiny_model(folder)
            yield find_model(str(folder), None)


class EncoderConfig(FrozenModelConfig):
    """Settings of a text encoder, whatever its kind."""

    max_tokens: int = Field(default=128, ge=2)
    """Longest caption in tokens, start and end tokens included; longer ones are cut and counted."""
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
        """FLOPs of captions of so many tokens each, without padding, from config.json; a multiply-add is two."""

    def workload(self, captions: Sequence[str]) -> EncoderWorkload:
        """Counts tokens and FLOPs with the tokenizer and config.json alone; no weights are read.

        Raises:
            MachineError: the model cannot be found, or its tokenizer not be read.
        """
        from stages.encoders.batches.tokens import load_tokenizer, tokenize

        with self.located() as files, reading(self):
            token_ids, _ = tokenize(load_tokenizer(files), captions, self.max_tokens)
            lengths = [len(ids) for ids in token_ids]
            return EncoderWorkload(
                [1] * len(lengths) if self.output in POOLED else lengths, self.flops(files, lengths)
            )

    def settings(self, files: ModelFiles) -> dict[str, object]:
        if files.tokenizer_sha256 is None:
            raise MachineError(
                f"encoders.model: {self.model}: no tokenizer files (tokenizer.json or spiece.model) beside the model"
            )
        return {
            "tokenizer_sha256": files.tokenizer_sha256,
            "max_tokens": self.max_tokens,
            "text_normalisation": NORMALISATION,
        }

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


@contextmanager
def reading(config: FrozenModelConfig) -> Iterator[None]:
    """Turns whatever the loaders raise for damaged files, which is almost anything, into a MachineError."""
    try:
        yield
    except MachineError:
        raise
    except Exception as error:
        raise MachineError(f"encoders.model: {config.model} cannot be loaded: {error}") from error


def refuse_kind(model: str, files: ModelFiles, wanted: str, remedy: str) -> MachineError:
    """The error for a model of another kind than asked for."""
    found = files.config.get("model_type")
    return MachineError(f"encoders.model: {model} is no {wanted} (model_type {found!r} in config.json); {remedy}")
