"""Images that a sampling starts from are read as precompute reads them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from stages.sampling.config import InitConfig, InpaintConfig
from stages.sampling.inputs import check_init, read_centres, read_inpaint
from tests.imagen_core.test_cascade import stage


def half_clear(path: Path) -> str:
    """The left half is transparent black, the right half red."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(path)
    return str(path)


def test_transparency_of_low_resolution_and_initial_images_is_white(tmp_path: Path) -> None:
    squares = read_centres([half_clear(tmp_path / "a.png"), None], (8, 8))
    assert squares is not None
    assert squares.shape == (1, 3, 8, 8)
    assert squares[0, :, 0, 0].tolist() == [1, 1, 1]
    assert squares[0, :, 0, 7].tolist() == [1, -1, -1]


def test_transparency_of_image_and_mask_is_white_when_inpainting(tmp_path: Path) -> None:
    image = half_clear(tmp_path / "a.png")
    mask = np.zeros((8, 8, 4), np.uint8)
    mask[4:, :, 3] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    inpaint = read_inpaint(InpaintConfig(image=image, mask=str(tmp_path / "mask.png")))
    assert inpaint.keep[0, 0, :, 0].tolist() == [True] * 4 + [False] * 4
    assert inpaint.image[0, :, 0, 0].tolist() == [1, 1, 1]


def test_an_unusable_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"a\.png: cannot be read as an image"):
        read_centres([str(tmp_path / "a.png")], (8, 8))


def test_a_sampler_that_adds_noise_cannot_encode_images() -> None:
    init = InitConfig(images=("a.png",), encode=True)
    check_init(init, stage(8))
    check_init(InitConfig(images=("a.png",)), stage(8, sampler={"kind": "ancestral"}))
    with pytest.raises(ConfigError, match=r"^init\.encode: .*adds noise, so it cannot encode; use ddim with eta=0"):
        check_init(init, stage(8, sampler={"kind": "ancestral"}))
