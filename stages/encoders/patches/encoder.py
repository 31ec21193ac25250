"""The loaded model, and the batches of images that go through it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stages.encoders.base import reading
from stages.encoders.batches.memory import run_batches
from stages.encoders.loading import place
from stages.encoders.model_files import ModelFiles
from stages.encoders.patches.config import PatchEncoderConfig
from stages.images.resample import resize

if TYPE_CHECKING:
    from torch import Tensor


class PatchEncoder:
    """An encoder of patches, on the GPU if there is one, else on the CPU."""

    def __init__(self, config: PatchEncoderConfig, files: ModelFiles, num_threads: int):
        self.config, self.dim = config, config.dim(files)
        self._patch_px, self._preprocessing = config.patch_px(files), config.preprocessing(files)
        self.device, self._dtype = place(config, num_threads)
        self.batch_size = config.batch_size
        with reading(config):
            self._model = config.build(files, self._dtype, self.device)

    def encode(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 RGB (height, width, 3) each -> float32 (rows, columns, dim) each.

        The result does not depend on the batches, beyond rounding. A batch that does not fit into memory halves
        `batch_size`, for as long as the encoder lives.

        Raises:
            MemoryError: not even one image fits.
        """
        grids = [self.config.grid((image.shape[0], image.shape[1]), self._patch_px) for image in images]

        def split(rest: Sequence[int], size: int) -> list[list[int]]:
            alike = [[i for i in rest if grids[i] == grid] for grid in dict.fromkeys(grids[i] for i in rest)]
            return [each[start : start + size] for each in alike for start in range(0, len(each), size)]

        batches = run_batches(
            range(len(images)),
            self.batch_size,
            split,
            lambda batch: self._forward([images[i] for i in batch], grids[batch[0]]),
        )
        self.batch_size = batches.limit
        found = {i: row for batch, rows in batches.results for i, row in zip(batch, rows.numpy(), strict=True)}
        return [found[i] for i in range(len(images))]

    def _forward(self, images: Sequence[np.ndarray], grid: tuple[int, int]) -> "Tensor":
        """Images of one ratio -> float32 (batch, rows, columns, dim) on the CPU."""
        import torch

        shape = (grid[0] * self._patch_px, grid[1] * self._patch_px)
        prepared = [self._preprocessing.normalize(resize(np.ascontiguousarray(image), shape)) for image in images]
        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack(prepared)).to(self.device, self._dtype)
            return self._model(pixels).unflatten(1, grid).float().cpu()


def load_patch_encoder(config: PatchEncoderConfig, num_threads: int) -> PatchEncoder:
    """Loads the weights.

    Raises:
        MachineError: the model cannot be found or read.
    """
    with config.located() as files:
        return PatchEncoder(config, files, num_threads)
