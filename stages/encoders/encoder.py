"""A loaded text encoder: tokenizer, model, and the batches that go through it."""

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stages.encoders.base import Encoded, EncoderConfig, FloatArray, reading
from stages.encoders.batches.batching import token_budget_batches
from stages.encoders.batches.memory import run_batches
from stages.encoders.batches.tokens import load_tokenizer, tokenize
from stages.encoders.loading import place
from stages.encoders.model_files import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS_ON_CPU, _TOKENS_ON_GPU = 4096, 16384


class TextEncoder:
    """An encoder on the GPU if there is one, else on the CPU.

    Several threads may encode at once: the model is used by one at a time, so that one can read and tokenise and
    another one cast and write meanwhile.
    """

    def __init__(self, config: EncoderConfig, files: ModelFiles, num_threads: int):
        self.config = config
        self.device, dtype = place(config, num_threads)
        self.dim = config.dim(files)
        with reading(config):
            self.tokenizer = load_tokenizer(files)
            self.model = config.build(files, dtype, self.device)
        default = _TOKENS_ON_CPU if self.device.type == "cpu" else _TOKENS_ON_GPU
        self.tokens_per_batch = config.tokens_per_batch or default
        self._tokenizing, self._computing = threading.Lock(), threading.Lock()

    def encode(self, captions: Sequence[str]) -> Encoded:
        """Encodes captions in batches of equal or similar lengths and a bounded number of tokens.

        The result does not depend on which captions come together, beyond rounding. A batch that does not fit into
        memory halves `tokens_per_batch`, for as long as the encoder lives.

        Raises:
            MemoryError: not even one caption fits.
        """
        with self._tokenizing:
            token_ids, num_truncated = tokenize(self.tokenizer, captions, self.config.max_tokens)
        lengths = [len(ids) for ids in token_ids]

        def split(rest: Sequence[int], budget: int) -> list[list[int]]:
            batches = token_budget_batches([lengths[i] for i in rest], budget, padded=self.model.padded)
            return [[rest[place] for place in batch] for batch in batches]

        began = time.perf_counter()
        with self._computing:
            waited_s = time.perf_counter() - began
            batches = run_batches(
                range(len(captions)),
                self.tokens_per_batch,
                split,
                lambda batch: self._forward([token_ids[i] for i in batch]),
            )
            self.tokens_per_batch = batches.limit
            self._wait()
        embeddings: list[FloatArray | None] = [None] * len(captions)
        for batch, rows in batches.results:
            ends = np.cumsum([1 if self.model.pooled else lengths[i] for i in batch])
            for index, values in zip(batch, np.split(rows.numpy(), ends[:-1]), strict=True):
                embeddings[index] = values
        return Encoded([e for e in embeddings if e is not None], num_truncated, waited_s, batches.halvings)

    def _forward(self, token_ids: Sequence[Sequence[int]]) -> "Tensor":
        """One batch: float32 (rows, dim) on the CPU; from a GPU it may still be on its way."""
        import torch

        on_gpu = self.device.type == "cuda"
        ids = torch.tensor([token for ids in token_ids for token in ids], dtype=torch.long, pin_memory=on_gpu)
        with torch.inference_mode():
            states = self.model(ids.to(self.device, non_blocking=True), [len(ids) for ids in token_ids]).float()
            if not on_gpu:
                return states
            copied = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
            return copied.copy_(states, non_blocking=True)

    def _wait(self) -> None:
        """The only wait for the GPU in a shard: the copies back were started batch by batch."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()


def load_encoder(config: EncoderConfig, num_threads: int) -> TextEncoder:
    """Loads tokenizer and weights.

    Args:
        num_threads: CPU threads of the model where it runs on the CPU.
    Raises:
        MachineError: the model cannot be found or read.
    """
    with config.located() as files:
        return TextEncoder(config, files, num_threads)
