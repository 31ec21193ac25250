"""A square of each image, cropped where it is read, so that the rest is never loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from imagen_core.store.layout import ImageInfo


@dataclass(frozen=True, slots=True)
class CropBox:
    """A square of a stored image in its pixels, and whether it is flipped horizontally."""

    top: int
    left: int
    side: int
    flipped: bool = False

    def show(self, pixels: np.ndarray, side_px: int) -> np.ndarray:
        """uint8 (S, S, 3) -> (side_px, side_px, 3): resized (bicubic, antialiased) if the square has another side.

        By torch's uint8 kernel: three times as fast as Pillow, and within 2 levels of it.
        """
        square = pixels[self.top : self.top + self.side, self.left : self.left + self.side]
        if self.side == side_px and not self.flipped:
            return square
        import torch
        from torch.nn.functional import interpolate

        image = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]  # (1, 3, s, s), channels last in memory
        if self.side != side_px:
            image = interpolate(image, size=(side_px, side_px), mode="bicubic", antialias=True)
        if self.flipped:
            image = image.flip(-1)
        return image[0].permute(1, 2, 0).numpy()


Layout = Mapping[int, tuple[int, int]]
"""By requested size: the stored size it is made from, and its side in the batch."""


class View(Protocol):
    """What a batch shows of each image. Sample `position` of `epoch` has the counter
    `epoch * samples per epoch + position`, whatever the batch size, the rank and the world size."""

    def layout(self, sizes: Sequence[int]) -> Layout:
        """Where images of these sizes come from; ValueError if they cannot."""
        ...

    def random_numbers(self, counters: Sequence[int]) -> np.ndarray:
        """The random numbers of the samples with these counters, (n, d) in [0, 1)."""
        ...

    def boxes(self, layout: Layout, numbers: Sequence[float], image: ImageInfo) -> dict[int, CropBox]:
        """The square of each size for a sample with these random numbers (d,)."""
        ...


class FullImage:
    """The image as it is stored."""

    def layout(self, sizes: Sequence[int]) -> Layout:
        return {size: (size, size) for size in sizes}

    def random_numbers(self, counters: Sequence[int]) -> np.ndarray:
        return np.empty((len(counters), 0))

    def boxes(self, layout: Layout, numbers: Sequence[float], image: ImageInfo) -> dict[int, CropBox]:
        return {size: CropBox(0, 0, stored) for size, (stored, _) in layout.items()}


@dataclass(frozen=True, slots=True)
class Crop:
    """The same square of every size of an image, on the grid of the smallest size.

    Attributes:
        side_px: its side in pixels of the largest size.
        places: how far down and to the right it lies, (n, 2) in [0, 1), for samples by their counters.
    """

    side_px: int
    places: Callable[[Sequence[int]], np.ndarray]

    def layout(self, sizes: Sequence[int]) -> Layout:
        """Side of the square in each size.

        Raises:
            ValueError: it has no integer number of pixels in a size, or does not fit.
        """
        smallest, largest = min(sizes), max(sizes)
        if not 1 <= self.side_px <= largest or any(size % smallest for size in sizes):
            raise ValueError(f"crop of {self.side_px} px does not fit images of {sorted(sizes)} px")
        if self.side_px % (largest // smallest):
            raise ValueError(
                f"crop of {self.side_px} px must be a multiple of {largest}/{smallest} = {largest // smallest}"
            )
        return {size: (size, self.side_px * size // largest) for size in sizes}

    def random_numbers(self, counters: Sequence[int]) -> np.ndarray:
        return self.places(counters)

    def boxes(self, layout: Layout, numbers: Sequence[float], image: ImageInfo) -> dict[int, CropBox]:
        smallest = min(layout)
        top, left = (int(place * (smallest - layout[smallest][1] + 1)) for place in numbers[:2])
        return {
            size: CropBox(top * (size // smallest), left * (size // smallest), side)
            for size, (_, side) in layout.items()
        }
