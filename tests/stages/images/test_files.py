"""Single files are read by the rules of precompute."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from stages.images import center_square, decode_rgb, read_image, resize_square


def test_images_are_read_rotated_and_cropped_to_the_centre_square(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 30, 20))
    exif = image.getexif()
    exif[274] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").shape == (40, 20, 3)
    square = read_image(tmp_path / "a.png", 10)
    assert square.shape == (10, 10, 3)
    np.testing.assert_array_equal(square[5, 5], (0, 0, 255))


def test_a_file_is_read_and_resized_as_precompute_does(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (50, 71, 4), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = decode_rgb((tmp_path / "a.png").read_bytes(), max_pixels=10**6).pixels
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 16), resize_square(center_square(pixels), 16))


@pytest.mark.parametrize(
    ("content", "max_pixels", "message"),
    [
        (b"no image", 100, r"a\.png: cannot be read as an image \(not_an_image.*give a PNG"),
        (b"", 100, r"a\.png: cannot be read as an image \(empty_file"),
        (None, 99, r"a\.png: .*too_many_pixels: 10 x 10 is over 99 pixels\); give a smaller image"),
    ],
)
def test_an_unusable_file_is_an_error_that_names_it(
    tmp_path: Path, content: bytes | None, max_pixels: int, message: str
) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_image(tmp_path / "a.png", max_pixels=max_pixels)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.png: cannot be read as an image \(No such file"):
        read_image(tmp_path / "a.png")
