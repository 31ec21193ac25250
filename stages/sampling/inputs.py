"""Images that a sampling starts from: low-resolution and initial images, and inpainting."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from imagen_core.cascade import CascadeStage
from imagen_core.images import from_pixels
from imagen_core.samplers import Inpaint, encode
from imagen_core.store.buckets import Shape, crop_box
from pipeline.errors import ConfigError
from stages.images import read_image
from stages.images.resample import pyramid_of_shapes
from stages.sampling.config import InitConfig, InpaintConfig


def read_centres(paths: Sequence[str | None], shape: Shape | None) -> torch.Tensor | None:
    """The centres of images with the ratio of a shape, resized to it (bicubic, antialiased).

    Returns:
        (b, 3, *shape) in [-1, 1]; None if there are no images to read.
    Raises:
        ConfigError: an image cannot be read.
    """
    given = [path for path in paths if path is not None]
    if not given or shape is None:
        return None
    return from_pixels(np.stack([_centre(path, shape) for path in given]))


def read_condition_images(
    paths: Sequence[Mapping[str, str]], channels: Mapping[str, int], shape: Shape
) -> dict[str, torch.Tensor]:
    """The centres of further images with the ratio of a shape, resized to it (bicubic, antialiased), by name.

    Args:
        paths: of each image to generate, by name.
        channels: 1 or 3 of each name; a file for one channel must be gray.
    Returns:
        (b, channels, *shape) in [-1, 1] each.
    Raises:
        ConfigError: one cannot be read, or has colours where one channel is read.
    """
    result = {}
    for name, number in channels.items():
        pixels = np.stack([_centre(each[name], shape) for each in paths])
        coloured = (pixels != pixels[..., :1]).any(axis=(1, 2, 3))
        if number == 1 and coloured.any():
            path = paths[int(coloured.argmax())][name]
            raise ConfigError(
                f"condition_images.{name}: {path} has colours, and one channel is read; give a gray image"
            )
        result[name] = from_pixels(pixels[..., :number])
    return result


def _centre(path: str, shape: Shape) -> np.ndarray:
    """uint8 (*shape, 3)."""
    return pyramid_of_shapes(read_image(path), {0: shape})[0]


def read_inpaint(config: InpaintConfig, shape: Shape | None = None) -> Inpaint:
    """The centres of image and mask with the ratio of a shape; None: their centre squares.

    Raises:
        ConfigError: one cannot be read, or they have different sizes.
    """
    image, mask = read_image(config.image), read_image(config.mask)
    if image.shape != mask.shape:
        raise ConfigError(f"inpaint.mask: {mask.shape[:2]} pixels for an image of {image.shape[:2]}; make them equal")
    height, width, _ = image.shape
    left, top, right, bottom = crop_box(width, height, shape or (1, 1))
    image, mask = image[top:bottom, left:right], mask[top:bottom, left:right]
    keep = torch.from_numpy(mask[None, None, ..., 0] >= 128)
    return Inpaint(from_pixels(image[None]), keep, config.resample_times)


def check_init(config: InitConfig | None, first: CascadeStage) -> None:
    """ConfigError if images are to be encoded by a sampler that cannot, because it adds noise."""
    if config is None or not config.encode:
        return
    settings, schedule = first.sampling, first.config.diffusion.schedule
    sigmas = settings.grid.sigmas(schedule, settings.num_steps)
    try:
        encode(settings.sampler, lambda x, _: torch.zeros_like(x), sigmas, torch.zeros(1, 1, 1, 1), schedule=schedule)
    except ValueError as error:
        raise ConfigError(f"init.encode: {error} (stages.0.sampling.sampler)") from error
