"""Loaded encoders of captions and of images: the model, and the batches that go through it."""

import threading
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from stages.encoders.base import Encoded, EncoderConfig, FloatArray, ImageModelConfig, reading
from stages.encoders.batches.batching import token_budget_batches
from stages.encoders.batches.memory import run_batches
from stages.encoders.batches.model_input import ModelInput
from stages.encoders.batches.tokens import load_tokenizer, unknown_id
from stages.encoders.loading import place
from stages.encoders.model_files import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS_ON_CPU, _TOKENS_ON_GPU = 4096, 16384


class TextEncoder:
    """An encoder of captions, on the GPU if there is one, else on the CPU.

    Several threads may encode at once: the model is used by one at a time, while another one reads and tokenises and
    a third one casts and writes.
    """

    def __init__(self, config: EncoderConfig, files: ModelFiles, num_threads: int):
        self.config = config
        self.device, dtype = place(config, num_threads)
        self.dim = config.dim(files)
        self.layers, _ = config.joined_layers(files)
        with reading(config):
            self.tokenizer = load_tokenizer(files)
            self.read = config.reader(self.tokenizer)
            self.model = config.build(files, dtype, self.device)
        default = _TOKENS_ON_CPU if self.device.type == "cpu" else _TOKENS_ON_GPU
        self.tokens_per_batch = config.tokens_per_batch or default
        self._unknown_id = unknown_id(self.tokenizer)
        self._tokenizing, self._computing = threading.Lock(), threading.Lock()
        self._shared_ids = config.shared_start(files, self.read)
        self._shared_states = self._share(self.model) if self._shared_ids else None

    def _share(self, model: Any) -> FloatArray:
        """The states of the tokens that captions begin with; the model goes on behind them from now on."""
        import torch

        with torch.inference_mode():
            return model.share(torch.tensor(self._shared_ids, device=self.device)).float().cpu().numpy()

    def encode(self, captions: Sequence[str]) -> Encoded:
        """Encodes captions in batches of equal or similar lengths and a bounded number of tokens.

        The result does not depend on the batches, beyond rounding. A batch that does not fit into
        memory halves `tokens_per_batch`, for as long as the encoder lives. A caption of which the tokenizer leaves no
        token does not go through the model; it has no rows.

        Raises:
            MemoryError: not even one caption fits.
        """
        with self._tokenizing:
            inputs, num_truncated = self.read(captions)
        shared = [len(self._shared_ids) if each.begins_with(self._shared_ids) else 0 for each in inputs]
        lengths = [len(each.ids) - start for each, start in zip(inputs, shared, strict=True)]

        def split(rest: Sequence[int], budget: int) -> list[list[int]]:
            batches = token_budget_batches([lengths[i] for i in rest], budget, padded=self.model.padded)
            return [[rest[place] for place in batch] for batch in batches]

        began = time.perf_counter()
        with self._computing:
            waited_s = time.perf_counter() - began
            batches = run_batches(
                [i for i, length in enumerate(lengths) if length],
                self.tokens_per_batch,
                split,
                lambda batch: self._forward([inputs[i] for i in batch], [shared[i] for i in batch]),
            )
            self.tokens_per_batch = batches.limit
            self._wait()
        nothing = np.zeros((0, self.dim), np.float32)
        embeddings: list[FloatArray] = [nothing] * len(captions)
        for batch, rows in batches.results:
            ends = np.cumsum([1 if self.model.pooled else lengths[i] for i in batch])
            for index, values in zip(batch, np.split(rows.numpy(), ends[:-1]), strict=True):
                before = self._shared_states if shared[index] else None
                embeddings[index] = values if self.model.pooled else inputs[index].kept(values, before)
        return Encoded(embeddings, num_truncated, waited_s, batches.halvings, self._num_unknown(inputs))

    def _num_unknown(self, inputs: Sequence[ModelInput]) -> int:
        if self._unknown_id is None:
            return 0
        counts = [each.ids.count(self._unknown_id) for each in inputs]
        return sum(count > 0 for count in counts) if self.model.pooled else sum(counts)

    def _forward(self, inputs: Sequence[ModelInput], shared: Sequence[int]) -> "Tensor":
        """One batch: float32 (rows, dim) on the CPU; the copy from a GPU may not be complete yet.

        Args:
            shared: how many first tokens of each caption have been run before; they have no rows.
        """
        import torch

        on_gpu = self.device.type == "cuda"
        own = [each.ids[start:] for each, start in zip(inputs, shared, strict=True)]
        tokens = [token for ids in own for token in ids]
        ids = torch.tensor(tokens, dtype=torch.long, pin_memory=on_gpu).to(self.device, non_blocking=True)
        masked = [each.masked for each in inputs]
        options: dict[str, Any] = {"masked": masked} if any(start < stop for start, stop in masked) else {}
        if any(shared):
            options["shares"] = [start > 0 for start in shared]
        with torch.inference_mode():
            states = self.model(ids, [len(each) for each in own], **options).float()
            if not on_gpu:
                return states
            copied = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
            return copied.copy_(states, non_blocking=True)

    def _wait(self) -> None:
        """The only wait for the GPU in a shard: the copies to the CPU were started batch by batch."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()


class ImageEncoder:
    """An encoder of images, on the GPU if there is one, else on the CPU."""

    def __init__(self, config: ImageModelConfig, files: ModelFiles, num_threads: int):
        self.dim, self._preprocessing = config.dim(files), config.preprocessing(files)
        self.device, self._dtype = place(config, num_threads)
        self.batch_size = config.batch_size
        with reading(config):
            self._model = config.build(files, self._dtype, self.device)

    def encode(self, images: Iterable[np.ndarray]) -> Encoded:
        """uint8 RGB (side, side, 3) each -> float32 (1, dim) each; does not depend on the batches beyond rounding.

        A batch that does not fit into memory halves `batch_size`, for as long as the encoder lives.

        Raises:
            MemoryError: not even one image fits.
        """
        rows: list[FloatArray] = []
        halvings = 0
        prepared = map(self._preprocessing.prepare, images)
        while part := list(islice(prepared, self.batch_size)):
            batches = run_batches(
                range(len(part)),
                self.batch_size,
                lambda rest, size: [list(rest[i : i + size]) for i in range(0, len(rest), size)],
                lambda batch: self._forward(np.stack([part[i] for i in batch])),
            )
            self.batch_size, halvings = batches.limit, halvings + batches.halvings
            rows += [row[None] for _, values in batches.results for row in values.numpy()]
        return Encoded(rows, oom_halvings=halvings)

    def _forward(self, pixels: np.ndarray) -> "Tensor":
        """float32 (batch, 3, size_px, size_px) -> float32 (batch, dim) on the CPU."""
        import torch

        with torch.inference_mode():
            return self._model(torch.from_numpy(pixels).to(self.device, self._dtype)).float().cpu()


@overload
def load_encoder(config: EncoderConfig, num_threads: int) -> TextEncoder: ...


@overload
def load_encoder(config: ImageModelConfig, num_threads: int) -> ImageEncoder: ...


def load_encoder(config: EncoderConfig | ImageModelConfig, num_threads: int) -> TextEncoder | ImageEncoder:
    """Loads the weights, and the tokenizer of a text encoder.

    Args:
        num_threads: CPU threads of the model where it runs on the CPU.
    Raises:
        MachineError: the model cannot be found or read.
    """
    with config.located() as files:
        if isinstance(config, EncoderConfig):
            return TextEncoder(config, files, num_threads)
        return ImageEncoder(config, files, num_threads)
