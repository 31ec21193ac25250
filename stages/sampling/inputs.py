"""Images that a sampling starts from: low-resolution and initial images, and inpainting."""

from collections.abc import Sequence

import numpy as np
import torch

from imagen_core.images import from_pixels
from imagen_core.samplers import Inpaint
from pipeline.errors import ConfigError
from stages.images import read_image
from stages.sampling.config import InpaintConfig


def read_squares(paths: Sequence[str | None], size_px: int | None) -> torch.Tensor | None:
    """Centre squares (b, 3, size_px, size_px) in [-1, 1]; None if there are no images to read.

    Raises:
        ConfigError: an image cannot be read.
    """
    given = [path for path in paths if path is not None]
    if not given:
        return None
    return from_pixels(np.stack([read_image(path, size_px) for path in given]))


def read_inpaint(config: InpaintConfig) -> Inpaint:
    """The centre squares of image and mask.

    Raises:
        ConfigError: one cannot be read, or they have different sizes.
    """
    image, mask = read_image(config.image), read_image(config.mask)
    if image.shape != mask.shape:
        raise ConfigError(f"inpaint.mask: {mask.shape[:2]} pixels for an image of {image.shape[:2]}; make them equal")
    height, width, _ = image.shape
    side = min(height, width)
    square = np.s_[(height - side) // 2 :, (width - side) // 2 :]
    image, mask = image[square][:side, :side], mask[square][:side, :side]
    keep = torch.from_numpy(mask[None, None, ..., 0] >= 128)
    return Inpaint(from_pixels(image[None]), keep, config.resample_times)
