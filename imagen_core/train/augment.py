"""Random views of the stored images, made where they are read: crops that keep writing intact, flips; and changes of
low-resolution images: blur, JPEG, grayscale, tints.

After nostalgebraist/improved-diffusion (crop.py, image_datasets.py): a crop never divides the rectangle around the
writing in an image, never needs more detail than the original has, and images without writing may have their own
settings. Nothing of it is in the store, which holds a size larger than the one trained on.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from imagen_core.config import Config
from imagen_core.store import CropBox, Frame, ImageInfo, Layout, StoredShape, View
from imagen_core.store.buckets import Shape, crop_box, round_half_up, scaled

_ROUNDING = 1e-9

RandomRows = Callable[[Sequence[int]], np.ndarray]
"""Random numbers in [0, 1) of the samples with these counters, one row per sample."""


class CropConfig(Config):
    """Crops with the ratio of the image, of uniform area and place among the allowed ones."""

    probability: float = Field(default=1.0, ge=0, le=1)
    """Fraction of the images that are cropped; the others are shown in full."""
    min_scale: float = Field(default=0.75, gt=0, le=1)
    """Least area of a crop, as a fraction of the image's."""
    max_scale: float = Field(default=1.0, gt=0, le=1)
    """Largest area of a crop; larger only where the writing or `min_px` needs it."""

    @model_validator(mode="after")
    def _check(self) -> "CropConfig":
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale} is larger than max_scale {self.max_scale}")
        return self


class ResizedCropConfig(CropConfig):
    """Training on crops of a larger stored size, resized (bicubic, antialiased) to what the model sees.

    The low-resolution image of a super-resolution stage is made from the same crop. A crop contains the safebox of
    its image; an image whose writing has no known place is shown in full.
    """

    from_px: int = Field(ge=1)
    """StoredEmbedding size that is cropped."""
    min_px: float = Field(default=1.0, ge=0)
    """Least sides of a crop, as a multiple of those trained on, in pixels of the stored image and of the original
    alike: at 1 nothing is upsampled (where that needs more than the image has, it is shown in full)."""
    without_text: CropConfig | None = None
    """Settings of images without writing (an empty or no transcription, and no safebox); null: the same."""


class BlurConfig(Config):
    """Gaussian blur of the low-resolution image in training, before it is upsampled.

    Ho et al. 2022 (arXiv 2106.15282); the defaults are DALLE2-pytorch's.
    """

    probability: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the images that are blurred."""
    sigma: float | tuple[float, float] = 0.6
    """Standard deviation in pixels, or the lowest and the highest of a uniform range."""
    kernel: int = Field(default=3, ge=1)
    """Side of the kernel in pixels, odd."""

    @model_validator(mode="after")
    def _check(self) -> "BlurConfig":
        low, high = self.range
        if not 0 < low <= high:
            raise ValueError(f"sigma: must be above 0 and not fall (got {self.sigma})")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: must be odd (got {self.kernel})")
        return self

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest sigma."""
        return self.sigma if isinstance(self.sigma, tuple) else (self.sigma, self.sigma)


class JpegConfig(Config):
    """The low-resolution image written as JPEG and read again in training, before it is blurred and upsampled."""

    probability: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the images."""
    quality: int | tuple[int, int] = (30, 95)
    """Quality as Pillow counts it, 1 to 95, or the lowest and the highest of a uniform range; chroma is halved."""

    @model_validator(mode="after")
    def _check(self) -> "JpegConfig":
        low, high = self.range
        if not 1 <= low <= high <= 95:
            raise ValueError(f"quality: must be in 1 to 95 and not fall (got {self.quality})")
        return self

    @property
    def range(self) -> tuple[int, int]:
        """Lowest and highest quality."""
        return self.quality if isinstance(self.quality, tuple) else (self.quality, self.quality)


class TintConfig(Config):
    """The low-resolution image in shades of one colour in training, as of old or toned photographs."""

    probability: float = Field(default=0.1, ge=0, le=1)
    """Fraction of the images."""
    strength: float = Field(default=0.5, gt=0, le=1)
    """The brightness of each channel is the image's luma times a factor that is uniform in [1 - strength, 1]."""


@dataclass(frozen=True, slots=True)
class RandomResizedCrop:
    """A part of one stored size with its ratio, resized to each requested size.

    Attributes:
        rows: (n, 4) random numbers: whether the image is cropped, the area, how far down and to the right it lies.
    """

    config: ResizedCropConfig
    rows: RandomRows

    def layout(self, sizes: Sequence[int], shape_of: StoredShape) -> Layout:
        """Raises ValueError if the shapes of a bucket have no whole number of pixels in a size."""
        from_px = self.config.from_px
        stored = shape_of(from_px)
        return {size: Frame(from_px, stored, scaled([stored], from_px, size)[0]) for size in sizes}

    def random_numbers(self, counters: Sequence[int]) -> np.ndarray:
        return self.rows(counters)

    def boxes(self, layout: Layout, numbers: Sequence[float], image: ImageInfo) -> dict[int, CropBox]:
        return dict.fromkeys(layout, self.box(layout[max(layout)], numbers, image))

    def box(self, frame: Frame, numbers: Sequence[float], image: ImageInfo) -> CropBox:
        """The crop for a model of the size of `frame`, in pixels of the stored image."""
        height, width = frame.stored
        full = CropBox(0, 0, height, width)
        settings: CropConfig = self.config
        if self.config.without_text is not None and not image.shows_text:
            settings = self.config.without_text
        cropped, area, down, right = numbers
        if cropped >= settings.probability or (image.shows_text and image.safebox is None):
            return full
        low, high = self.sides(settings, frame, image)
        # Uniform in area: of the sides in [low, high], s has the probability of areas in [s^2, (s + 1)^2).
        side = min(math.isqrt(int(low**2 + area * ((high + 1) ** 2 - low**2))), high)
        rows, columns = (round_half_up(side * each, min(frame.stored)) for each in frame.stored)
        left, top, end, bottom = stored_box(image, frame.stored)
        return CropBox(
            _place(height, rows, top, bottom, down), _place(width, columns, left, end, right), rows, columns
        )

    def sides(self, settings: CropConfig, frame: Frame, image: ImageInfo) -> tuple[int, int]:
        """The smallest and the largest shorter side of a crop of this image."""
        (height, width), short = frame.stored, min(frame.stored)
        left, top, right, bottom = stored_box(image, frame.stored)
        upsampled = _upsampled(image, frame.stored)  # by precompute, where the original was too small
        detail = min(short, math.ceil(self.config.min_px * min(frame.shown) * upsampled - _ROUNDING))
        wanted = math.ceil(short * math.sqrt(settings.min_scale) - _ROUNDING)
        writing = (-(-(right - left) * short // width), -(-(bottom - top) * short // height))
        low = max(1, wanted, detail, *writing)
        return low, max(low, math.floor(short * math.sqrt(settings.max_scale) + _ROUNDING))


@dataclass(frozen=True, slots=True)
class Flipped:
    """Another view, with a fraction of the images flipped: never one that shows writing.

    Attributes:
        rows: (n, 1) random numbers.
    """

    view: View
    probability: float
    rows: RandomRows

    def layout(self, sizes: Sequence[int], shape_of: StoredShape) -> Layout:
        return self.view.layout(sizes, shape_of)

    def random_numbers(self, counters: Sequence[int]) -> np.ndarray:
        return np.concatenate([self.rows(counters), self.view.random_numbers(counters)], axis=1)

    def boxes(self, layout: Layout, numbers: Sequence[float], image: ImageInfo) -> dict[int, CropBox]:
        boxes = self.view.boxes(layout, numbers[1:], image)
        if numbers[0] >= self.probability or image.shows_text:
            return boxes
        return {size: replace(box, flipped=True) for size, box in boxes.items()}


def stored_box(image: ImageInfo, stored: Shape) -> tuple[int, int, int, int]:
    """The safebox in pixels of a stored image of this shape, grown to integers; empty where it shows none of it."""
    if image.safebox is None or not min(image.width, image.height):
        return 0, 0, 0, 0
    (height, width), (left, top, right, bottom) = stored, crop_box(image.width, image.height, stored)
    axes = ((left, width, right - left), (top, height, bottom - top)) * 2
    places = [(at - margin) * px / kept for at, (margin, px, kept) in zip(image.safebox, axes, strict=True)]
    grown = [*(math.floor(at + _ROUNDING) for at in places[:2]), *(math.ceil(at - _ROUNDING) for at in places[2:])]
    left, top, right, bottom = (min(max(at, 0), px) for at, (_, px, _) in zip(grown, axes, strict=True))
    return (left, top, right, bottom) if left < right and top < bottom else (0, 0, 0, 0)


def _upsampled(image: ImageInfo, stored: Shape) -> float:
    """How many times as large as in the original a stored image shows its content; 1 where it is smaller."""
    left, top, right, bottom = crop_box(image.width, image.height, stored)
    return max(1.0, stored[1] / (right - left), stored[0] / (bottom - top))


def _place(stored_px: int, side: int, first: int, last: int, uniform: float) -> int:
    """Start of a crop that contains [first, last), if that is not empty."""
    low, high = (max(0, last - side), min(first, stored_px - side)) if last > first else (0, stored_px - side)
    return low + int(uniform * (high - low + 1))


def grayscale(images: Tensor, rows: Tensor | None = None) -> Tensor:
    """RGB (b, 3, h, w) -> their luma (ITU-R BT.601) in all channels; only where bool (b,) `rows` is true."""
    luma = torch.einsum("bchw,c->bhw", images, images.new_tensor([0.299, 0.587, 0.114]))[:, None]
    result = luma.expand_as(images)
    return result if rows is None else torch.where(rows.to(images.device)[:, None, None, None], result, images)


def blur(images: Tensor, config: BlurConfig, uniform: Tensor) -> Tensor:
    """Blurs some of the images (b, c, h, w), with replicated edges; the others stay as they are.

    Args:
        uniform: (b, 2) in [0, 1): whether an image is blurred, and its sigma in the range.
    """
    low, high = config.range
    sigma = low + uniform[:, 1:] * (high - low)  # (b, 1)
    reach = config.kernel // 2
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.softmax(-(steps**2) / (2 * sigma**2), dim=1).to(images)  # (b, k)
    result = images
    for axis in (2, 3):
        sides = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        padded, length = F.pad(result, sides, mode="replicate"), images.shape[axis]
        parts = (w[:, None, None, None] * padded.narrow(axis, k, length) for k, w in enumerate(weights.unbind(1)))
        result = sum(parts, start=torch.zeros_like(images))
    chosen = (uniform[:, 0] < config.probability).to(images.device)
    return torch.where(chosen[:, None, None, None], result, images)


def tint(images: Tensor, config: TintConfig, uniform: Tensor) -> Tensor:
    """Shows some of the RGB images (b, 3, h, w), in [-1, 1], in shades of one colour each.

    Args:
        uniform: (b, 4) in [0, 1): whether an image is tinted, and where the factor of each channel is in its range.
    """
    factors = (1 - config.strength * (1 - uniform[:, 1:])).to(images)[:, :, None, None]
    tinted = (grayscale(images) + 1) * factors - 1
    chosen = (uniform[:, 0] < config.probability).to(images.device)
    return torch.where(chosen[:, None, None, None], tinted, images)


def jpeg(images: Tensor, config: JpegConfig, uniform: Tensor) -> Tensor:
    """Writes some of the images, uint8 (b, 3, h, w) in main memory, as JPEG and reads them again.

    Args:
        uniform: (b, 2) in [0, 1): whether an image is written, and its quality in the range.
    """
    low, high = config.range
    result = images.clone()
    for row in torch.nonzero(uniform[: len(images), 0] < config.probability).flatten().tolist():
        quality = low + int(float(uniform[row, 1]) * (high - low + 1))
        file = io.BytesIO()
        Image.fromarray(images[row].permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=quality)
        with Image.open(file) as decoded:
            result[row] = torch.from_numpy(np.array(decoded)).permute(2, 0, 1)
    return result
