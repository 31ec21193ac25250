"""A square cut out of each picture where it is read, so that the rest is never loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Window = tuple[slice, slice]
WHOLE: Window = (slice(None), slice(None))


@dataclass(frozen=True, slots=True)
class Crop:
    """The same square of every size of a picture, on the grid of the smallest size.

    Attributes:
        side_px: its side in pixels of the largest size.
        places: how far down and to the right it lies, (n, 2) in [0, 1), for samples by their numbers: sample
            `position` of `epoch` has number `epoch * samples of an epoch + position`, whatever the world size.
    """

    side_px: int
    places: Callable[[range], np.ndarray]

    def sides(self, sizes: Sequence[int]) -> dict[int, int]:
        """Side of the square in each size.

        Raises:
            ValueError: it has no whole number of pixels in a size, or does not fit.
        """
        smallest, largest = min(sizes), max(sizes)
        if not 1 <= self.side_px <= largest or any(size % smallest for size in sizes):
            raise ValueError(f"crop of {self.side_px} px does not fit pictures of {sorted(sizes)} px")
        if self.side_px % (largest // smallest):
            raise ValueError(
                f"crop of {self.side_px} px must be a multiple of {largest}/{smallest} = {largest // smallest}"
            )
        return {size: self.side_px * size // largest for size in sizes}

    def windows(self, sizes: Sequence[int], numbers: range) -> dict[int, list[Window]]:
        """Rows and columns of the square in each size, for each sample."""
        sides, smallest = self.sides(sizes), min(sizes)
        corners = (self.places(numbers) * (smallest - sides[smallest] + 1)).astype(np.int64).tolist()
        return {size: [_window(corner, side, size // smallest) for corner in corners] for size, side in sides.items()}


def _window(corner: list[int], side: int, ratio: int) -> Window:
    top, left = (ratio * at for at in corner)
    return slice(top, top + side), slice(left, left + side)
