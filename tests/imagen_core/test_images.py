"""Pixels survive the way to the models' range and back."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from imagen_core.images import from_pixels, tile, to_pixels, write_png


def test_every_level_survives_the_round_trip() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    images = from_pixels(levels)
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_pixels(images), levels)


def test_values_out_of_range_are_clipped() -> None:
    assert to_pixels(torch.full((1, 3, 1, 1), 1.7)).max() == 255
    assert to_pixels(torch.full((1, 3, 1, 1), -1.7)).min() == 0


def test_tiles_lie_in_rows_on_white(tmp_path: Path) -> None:
    images = [np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30)]
    canvas = tile(images, columns=2, gap_px=1)
    assert canvas.shape == (9, 9, 3)
    assert [int(canvas[y, x, 0]) for y, x in ((0, 0), (0, 5), (5, 0), (4, 0), (8, 8))] == [10, 20, 30, 255, 255]
    write_png(tmp_path / "grid.png", canvas)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), canvas)
