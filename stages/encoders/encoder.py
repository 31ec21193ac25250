"""A loaded text encoder: tokenizer, model, and the batches that go through it."""

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.encoders.base import Encoded, EncoderConfig, FloatArray
from stages.encoders.batching import token_budget_batches
from stages.encoders.loading import place, reading
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
        from transformers import AutoTokenizer

        self.config = config
        self.device, dtype = place(config, num_threads)
        self.dim = config.dim(files)
        with reading(config):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(files.model, revision=files.revision or "main")
            self.model = config.build(files, dtype, self.device)
        default = _TOKENS_ON_CPU if self.device.type == "cpu" else _TOKENS_ON_GPU
        self.tokens_per_batch = config.tokens_per_batch or default
        self._tokenizing, self._computing = threading.Lock(), threading.Lock()

    def encode(self, captions: Sequence[str]) -> Encoded:
        """Encodes captions in batches of equal or similar lengths and a bounded number of tokens.

        The result does not depend on which captions come together, beyond rounding.
        """
        with self._tokenizing:
            token_ids, num_truncated = self._tokenize(captions)
        lengths = [len(ids) for ids in token_ids]
        batches = token_budget_batches(lengths, self.tokens_per_batch, padded=self.model.padded)
        began = time.perf_counter()
        with self._computing:
            waited_s = time.perf_counter() - began
            states = [self._forward([token_ids[i] for i in batch]) for batch in batches]
            self._wait()
        embeddings: list[FloatArray | None] = [None] * len(captions)
        for batch, rows in zip(batches, states, strict=True):
            ends = np.cumsum([1 if self.model.pooled else lengths[i] for i in batch])
            for index, values in zip(batch, np.split(rows.numpy(), ends[:-1]), strict=True):
                embeddings[index] = values
        return Encoded([e for e in embeddings if e is not None], num_truncated, waited_s)

    def _tokenize(self, captions: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids with start and end tokens, at most max_tokens each; and how many captions were cut."""
        if not captions:
            return [], 0
        limit = self.config.max_tokens
        all_ids: list[list[int]] = self.tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
        long = [i for i, ids in enumerate(all_ids) if len(ids) > limit]
        if long:  # the tokenizer knows which of its tokens must stay at the end
            cut = self.tokenizer([captions[i] for i in long], truncation=True, max_length=limit)["input_ids"]
            for i, ids in zip(long, cut, strict=True):
                all_ids[i] = ids
        return all_ids, len(long)

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
