"""Images that a sampling starts from: low-resolution sources and inpainting."""

from collections.abc import Sequence

import numpy as np
import torch

from imagen_core.images import from_pixels, read_image
from imagen_core.samplers import Inpaint
from pipeline.errors import ConfigError
from stages.sampling.config import SampleConfig
from stages.sampling.requests import ImageRequest


def _read_sources(paths: Sequence[str], batch: Sequence[ImageRequest], size_px: int | None) -> torch.Tensor | None:
    """Centre squares (b, 3, size_px, size_px) in [-1, 1], or None if there are no images to read."""
    if not paths:
        return None
    try:
        pixels = [read_image(paths[image.source], size_px) for image in batch]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return from_pixels(np.stack(pixels))


def _inpaint(config: SampleConfig) -> Inpaint | None:
    if config.inpaint_image is None or config.inpaint_mask is None:
        return None
    try:
        image, mask = read_image(config.inpaint_image), read_image(config.inpaint_mask)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if image.shape != mask.shape:
        raise ConfigError(f"inpaint_mask: {mask.shape[:2]} pixels for an image of {image.shape[:2]}; make them equal")
    height, width, _ = image.shape
    side = min(height, width)
    square = np.s_[(height - side) // 2 :, (width - side) // 2 :]
    image, mask = image[square][:side, :side], mask[square][:side, :side]
    keep = torch.from_numpy(mask[None, None, ..., 0] >= 128)
    return Inpaint(from_pixels(image[None]), keep, config.inpaint_resample_times)
