"""T5 encoders (T5, v1.1, XXL ...) through transformers.

Imagen (Saharia et al. 2022, arXiv 2205.11487, section 2.1) conditions on the last hidden states of a
frozen T5-XXL encoder.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import MachineError
from stages.captions import NORMALISATION
from stages.encoders.base import Encoded, EncoderIdentity, FloatArray
from stages.encoders.batching import token_budget_batches
from stages.encoders.model_files import ModelFiles, find_model
from stages.encoders.tiny import TINY_MODEL, write_tiny_model

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS_ON_CPU, _TOKENS_ON_GPU = 4096, 16384


class T5EncoderConfig(Config):
    """A T5 encoder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the store's group `text-NAME`."""
    kind: Literal["t5"] = "t5"
    model: str
    """Hub id (`google/t5-v1_1-xxl`), local folder, or `tiny-random-t5` (built in, no download, for tests)."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    max_tokens: int = Field(default=128, ge=2)
    """Longest caption in tokens, end-of-sequence included; longer ones are cut and counted."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of weights and activations. T5-XXL overflows in float16, so that is not offered."""
    tokens_per_batch: int | None = Field(default=None, ge=1)
    """Tokens in one batch of the model; null: 4096 on a CPU (512 is as fast within 10 %), 16384 on a GPU."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs of one worker, also a fraction. null: one if there are any; 0: run on the CPU."""
    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs reserved for a GPU worker."""
    workers: int | None = Field(default=None, ge=1)
    """Workers that hold the model; null: one for each GPU, or one."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """Threads of a worker that runs on the CPU; null: all CPUs divided by the workers."""

    def identify(self) -> EncoderIdentity:
        """Finds the model and its hashes without loading it.

        Raises:
            MachineError: the model cannot be found.
        """
        with _located(self) as files:
            dim = files.config.get("d_model")
            if not isinstance(dim, int):
                raise MachineError(
                    f"encoders.model: {self.model} is no T5: its config.json has no d_model "
                    f"(model_type {files.config.get('model_type')!r}); give a T5"
                )
            return EncoderIdentity(
                dim=dim,
                fingerprint={
                    **files.identity,
                    "kind": self.kind,
                    "max_tokens": self.max_tokens,
                    "compute_dtype": self.compute_dtype,
                    "text_normalisation": NORMALISATION,
                    "output": "last_hidden_state",
                },
            )

    def pinned(self, identity: EncoderIdentity) -> "T5EncoderConfig":
        """The same encoder for any worker: a local folder by its full path, a hub model by its commit."""
        if Path(self.model).is_dir():
            return self.model_copy(update={"model": str(Path(self.model).absolute())})
        return self.model_copy(update={"revision": identity.fingerprint["revision"]})

    def load(self, num_threads: int) -> "T5Encoder":
        """Loads tokenizer and weights.

        Raises:
            MachineError: the model cannot be found or read.
        """
        with _located(self) as files:
            return T5Encoder(self, files, num_threads)


class T5Encoder:
    """A loaded T5 encoder on the GPU if there is one, else on the CPU."""

    def __init__(self, config: T5EncoderConfig, files: ModelFiles, num_threads: int):
        import torch
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging as transformers_logging

        from stages.encoders.t5_packed import PackedT5

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.config = config
        use_gpu = config.num_gpus != 0 and torch.cuda.is_available()
        self.device = torch.device("cuda" if use_gpu else "cpu")
        if not use_gpu:
            torch.set_num_threads(num_threads)
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.compute_dtype]
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(files.model, revision=files.revision or "main")
            model, report = cast(
                tuple[Any, dict[str, Any]],
                T5EncoderModel.from_pretrained(
                    files.model, revision=files.revision or "main", dtype=dtype, output_loading_info=True
                ),
            )
        except Exception as error:  # damaged files make the loaders raise almost anything
            raise MachineError(f"encoders.model: {config.model} cannot be loaded: {error}") from error
        if report["missing_keys"]:  # transformers would go on with random numbers in their place
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise MachineError(
                f"encoders.model: {config.model} lacks {len(report['missing_keys'])} weights of a T5 encoder "
                f"({missing} ...); give a folder with the whole encoder"
            )
        self.dim: int = model.config.d_model
        self.tokens_per_batch = config.tokens_per_batch or (_TOKENS_ON_GPU if use_gpu else _TOKENS_ON_CPU)
        self.model = PackedT5(model.to(self.device).eval().requires_grad_(False))

    def encode(self, captions: Sequence[str]) -> Encoded:
        """Encodes captions in batches of equal or similar lengths and a bounded number of tokens.

        Returns:
            float32 arrays (num_tokens, dim): the last hidden states.
        """
        import torch

        token_ids, num_truncated = self._tokenize(captions)
        batches = token_budget_batches([len(ids) for ids in token_ids], self.tokens_per_batch)
        hidden = [self._forward([token_ids[i] for i in batch]) for batch in batches]
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the copies back were started batch by batch; the only wait of a shard
        embeddings: list[FloatArray | None] = [None] * len(captions)
        for batch, states in zip(batches, hidden, strict=True):
            ends = np.cumsum([len(token_ids[i]) for i in batch])
            for index, values in zip(batch, np.split(states.numpy(), ends[:-1]), strict=True):
                embeddings[index] = values
        return Encoded([e for e in embeddings if e is not None], num_truncated)

    def _tokenize(self, captions: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids with end-of-sequence, at most max_tokens each; and how many captions were cut."""
        if not captions:
            return [], 0
        limit = self.config.max_tokens
        all_ids: list[list[int]] = self.tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
        cut = [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in all_ids]
        return cut, sum(len(ids) > limit for ids in all_ids)

    def _forward(self, token_ids: Sequence[Sequence[int]]) -> "Tensor":
        """One batch: float32 (tokens of all captions, dim) on the CPU; from a GPU it may still be on its way."""
        import torch

        on_gpu = self.device.type == "cuda"
        ids = torch.tensor([token for ids in token_ids for token in ids], dtype=torch.long, pin_memory=on_gpu)
        with torch.inference_mode():
            hidden = self.model(ids.to(self.device, non_blocking=True), [len(ids) for ids in token_ids]).float()
            if not on_gpu:
                return hidden
            copied = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
            return copied.copy_(hidden, non_blocking=True)


@contextmanager
def _located(config: T5EncoderConfig) -> Iterator[ModelFiles]:
    """The model's files; the built-in model exists as a folder for as long as it is needed."""
    if config.model != TINY_MODEL:
        yield find_model(config.model, config.revision)
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / TINY_MODEL
        write_tiny_model(folder)
        yield find_model(str(folder), None)
