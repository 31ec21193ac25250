"""Images of a folder are read as precompute reads them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from stages.evaluation.features.image_sets import ImageFolder


def test_transparency_is_white_and_deep_grayscale_keeps_its_high_byte(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)).save(tmp_path / "b.png")
    images = list(ImageFolder(path=str(tmp_path)).open("generated").read())
    assert [image.tolist() for image in images] == [[[[255] * 3] * 4] * 4, [[[128] * 3] * 4] * 4]


def test_an_image_with_too_many_pixels_is_an_error_that_names_it(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert len(list(ImageFolder(path=str(tmp_path), max_pixels=16).open("generated").read())) == 1
    with pytest.raises(ConfigError, match=r"a\.png: .*4 x 4 is over 15 pixels\); give a smaller image"):
        list(ImageFolder(path=str(tmp_path), max_pixels=15).open("generated").read())


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    for name in ("a.png", "._b.png", ".ipynb_checkpoints/c.png", "below/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert len(list(ImageFolder(path=str(tmp_path)).open("generated").read())) == 2
