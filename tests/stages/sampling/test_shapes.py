"""Which shape each image gets, and what is read for it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from imagen_core.cascade import Cascade, CascadeStage, SamplingConfig
from imagen_core.diffusion import Denoiser, DenoiserConfig
from imagen_core.store.buckets import bucket_shapes, scaled
from pipeline.errors import ConfigError
from stages.sampling.config import InpaintConfig, RequestConfig
from stages.sampling.inputs import read_centres, read_inpaint
from stages.sampling.requests import ImageRequest, resolve_requests
from stages.sampling.shapes import batches_of, with_shapes
from tests.imagen_core.store.handmade_store import bucket_list, make_store
from tests.trained import UNET


def make_cascade(*sizes: int) -> Cascade:
    """A base and super-resolution stages of these sizes, without captions."""
    stages = []
    for low, size in zip((None, *sizes), sizes, strict=False):
        unet = {**UNET, "image_size_px": size, "low_res": low is not None, "text_dim": None, "attention_type": "self"}
        config = DenoiserConfig.model_validate({"unet": unet, "size_px": size, "low_res_px": low})
        stages.append(CascadeStage(Denoiser(config), SamplingConfig()))
    return Cascade(stages)


def shapes_of(cascade: Cascade, **settings: object) -> list[tuple[int, int] | None]:
    config = RequestConfig.model_validate({"prompts": ["a", "b"], **settings})
    return [each.shape for each in with_shapes(resolve_requests(config), config, cascade)]


def test_an_aspect_is_the_nearest_shape_of_the_first_stage() -> None:
    cascade = make_cascade(64, 256)
    assert shapes_of(cascade, aspect="3:2") == [(48, 80)] * 2
    assert shapes_of(cascade, aspect=["2:3", "4:3"], num_images_per_prompt=2) == [(80, 48)] * 2 + [(56, 72)] * 2
    assert shapes_of(cascade, aspect="1:1") == shapes_of(cascade) == [None] * 2
    assert shapes_of(make_cascade(20), aspect="1:1") == [None] * 2, "of any size"
    assert cascade.shapes((48, 80)) == [(48, 80), (192, 320)]
    assert shapes_of(cascade, aspect="3:1")[0] == (40, 112), "beyond the usual 2:1"


def test_a_size_is_that_of_the_last_stage() -> None:
    cascade = make_cascade(64, 256)
    assert shapes_of(cascade, size=[208, 320]) == [(52, 80)] * 2
    assert shapes_of(cascade, size=[256, 256]) == [None] * 2
    with pytest.raises(ConfigError, match=r"size: \[200, 322\] is no whole number of pixels .* multiples of 4"):
        shapes_of(cascade, size=[200, 322])
    with pytest.raises(ConfigError, match=r"size: images of 51 x 80 px in the first stage .* multiples of 2 px; take"):
        shapes_of(cascade, size=[204, 320])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"aspect": "wide"}, r"must be width:height in whole numbers, such as 3:2 \(got 'wide'\)"),
        ({"aspect": ["3:2", "0:1"]}, r"got '0:1'"),
        ({"aspect": []}, "is empty"),
        ({"aspect": ["3:2"]}, "aspect has 1 entries for 2 prompts"),
        ({"aspect": "3:2", "size": [64, 64]}, "without aspect"),
        ({"size": [0, 64]}, "height and width in pixels"),
    ],
)
def test_what_is_no_shape_is_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        RequestConfig.model_validate({"prompts": ["a", "b"], **settings})
    with pytest.raises(ConfigError, match="aspect: 3:2: buckets need a smallest size that is a multiple of 8"):
        shapes_of(make_cascade(20), aspect="3:2")


def test_captions_of_a_store_of_buckets_give_the_shapes_of_its_samples(tmp_path: Path) -> None:
    wide, square, tall = (bucket_list(8)[bucket] for bucket in (2, 1, 0))
    make_store(tmp_path / "buckets", shard_rows=(4,), buckets=True)
    make_store(tmp_path / "squares", shard_rows=(4,))
    captions = {"kind": "store", "path": str(tmp_path / "buckets")}
    settings: dict[str, object] = {"prompts": [], "captions": captions}
    assert shapes_of(make_cascade(8), **settings) == [wide, tall, None, wide]
    assert square == (8, 8)
    assert shapes_of(make_cascade(64), **settings) == [(48, 80), (80, 48), None, (48, 80)], "of another size"
    assert shapes_of(make_cascade(8), **settings, aspect="1:1") == [None] * 4
    captions["path"] = str(tmp_path / "squares")
    assert shapes_of(make_cascade(8), **settings) == [None] * 4


def test_a_batch_is_of_one_shape() -> None:
    config = RequestConfig(prompts=("a", "b", "c", "d", "e"), aspect=("3:2", "1:1", "3:2", "3:2", "1:1"))
    requests = with_shapes(resolve_requests(config), config, make_cascade(64))
    batches = list(batches_of(requests, 2))
    assert [[each.index for each in batch] for batch in batches] == [[0, 2], [3], [1, 4]]


def test_images_that_are_read_are_cut_to_the_shape(tmp_path: Path) -> None:
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[15:45] = 200  # the centre of twice the width
    Image.fromarray(pixels).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    found = read_centres([path, None], (30, 60))
    assert found is not None
    assert found.shape == (1, 3, 30, 60)
    assert float((found * 127.5 + 127.5).min().round()) == 200
    assert read_centres([None], (30, 60)) is read_centres([path], None) is None
    inpaint = read_inpaint(InpaintConfig(image=path, mask=path), (24, 48))
    assert inpaint.keep.shape == (1, 1, 30, 60)
    assert bool(inpaint.keep.all())


def test_low_resolution_images_that_are_no_whole_number_of_pixels_are_refused() -> None:
    cascade = Cascade(make_cascade(16, 64).stages[1:])
    config = RequestConfig(prompts=("a",), low_res=("a.png",), size=(50, 80))
    with pytest.raises(ConfigError, match=r"size: images of 50 x 80 px are no whole number of pixels in the 16 px"):
        with_shapes([ImageRequest(0, resolve_requests(config)[0].caption, 0)], config, cascade)


def trained_on(cascade: Cascade, *shapes: tuple[tuple[int, int], ...]) -> Cascade:
    stages = [replace(stage, trained_shapes=own) for stage, own in zip(cascade.stages, shapes, strict=True)]
    return Cascade(stages)


def test_an_aspect_is_the_nearest_shape_that_the_first_stage_was_trained_on() -> None:
    cascade = trained_on(make_cascade(64), scaled(bucket_shapes(32), 32, 64))
    assert shapes_of(cascade, aspect="3:2") == [(48, 80)] * 2
    assert shapes_of(cascade, aspect="4:3") == [(48, 80)] * 2, "and not 56 x 72 px, which it never saw"
    assert shapes_of(cascade, aspect="3:1") == [(40, 112)] * 2, "beyond what it was trained on"
    assert shapes_of(trained_on(make_cascade(64), ((64, 64),)), aspect="4:3") == [(56, 72)] * 2


def test_shapes_that_a_stage_was_not_trained_on_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    squares, crops = ((64, 64),), ((128, 128),)
    wide = {"aspect": ["3:2", "1:1"]}
    assert shapes_of(trained_on(make_cascade(64, 256), squares, crops), **wide) == [(48, 80), None]
    (record,) = caplog.records
    assert record.getMessage() == (
        "the 64 px stage was trained on images of 64 x 64 px (height x width), not of 48 x 80, which may be worse"
    )
    caplog.clear()
    shapes_of(trained_on(make_cascade(64, 256), bucket_shapes(64), scaled(bucket_shapes(64), 64, 256)), **wide)
    shapes_of(make_cascade(64, 256), **wide)
    shapes_of(trained_on(make_cascade(64), squares))
    assert not caplog.records, "of what they were trained on, what is not known, and squares"
