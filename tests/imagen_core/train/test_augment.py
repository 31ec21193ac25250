"""Random crops spare writing, need no more detail than there is, and are functions of named random numbers alone."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagen_core.diffusion import Denoiser
from imagen_core.store import CropBox, Frame, ImageInfo, Store
from imagen_core.train import TrainConfig, TrainError, train
from imagen_core.train.augment import BlurConfig, Flipped, RandomResizedCrop, ResizedCropConfig, blur, stored_box
from imagen_core.train.components import ViewsConfig
from imagen_core.train.data.example import Example, make_example
from imagen_core.train.data.stores import open_stores
from imagen_core.train.data.stream import Batch, BatchStream, full_images
from imagen_core.train.parallel.world import World
from tests.imagen_core.train.small import BASE, SUPER, changed, make_config, make_store

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
PX = 48
"""Stored size."""
SIZES = {size: Frame(PX, (PX, PX), (size, size)) for size in (32, 16)}
FRAME = SIZES[16]
PLAIN_SUPER = SUPER | {"low_res_noise": None, "unet": SUPER["unet"] | {"low_res_noise": False}}


def writing(row: int) -> dict[str, Any]:
    """Of each four: writing at a known place, at an unknown place, none, nothing known. Centre square 60..540."""
    kinds: list[dict[str, Any]] = [
        {"transcription": "STOP", "safebox": (160, 100, 360, 220)},
        {"transcription": "GO"},
        {"transcription": ""},
        {},
    ]
    return {"width": 600, "height": 480, **kinds[row % 4]}


@pytest.fixture
def written_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.getbasetemp() / "written", large_px=PX, row_fields=writing)


def make_crop(**settings: Any) -> RandomResizedCrop:
    return RandomResizedCrop(
        ResizedCropConfig.model_validate({"from_px": PX, **settings}), lambda numbers: np.empty((0, 4))
    )


def random_rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 4))


def read(config: TrainConfig, count: int, world: World = ALONE, state: dict[str, Any] | None = None) -> list[Batch]:
    stream = BatchStream(open_stores(config), config, world, state)
    batches = [stream.next() for _ in range(count)]
    stream.close()
    return batches


def example(config: TrainConfig, batch: Batch) -> Example:
    return make_example(batch, config, Denoiser(config.denoiser), CPU, 0)


def test_no_crop_divides_a_safebox_or_leaves_the_image_or_upsamples_it() -> None:
    rng = np.random.default_rng(1)
    moved = 0
    for numbers in random_rows(4000):
        width, height = (int(side) for side in rng.integers(20, 900, 2))
        x, y = (sorted(rng.uniform(-0.1, 1.1, 2) * side) for side in (width, height))
        box = (math.floor(x[0]), math.floor(y[0]), math.ceil(x[1]) + 1, math.ceil(y[1]) + 1)
        image = ImageInfo(width, height, "text", box)
        cropped_box = make_crop(min_scale=0.05, max_scale=0.6).box(FRAME, numbers.tolist(), image)
        assert 0 <= cropped_box.top <= cropped_box.top + cropped_box.height <= PX
        assert 0 <= cropped_box.left <= cropped_box.left + cropped_box.height <= PX
        # In pixels of the original: the part of the box within the stored centre square lies within the crop.
        short = min(width, height)
        margin = ((width - short) // 2, (height - short) // 2)
        for axis, first in ((0, cropped_box.left), (1, cropped_box.top)):
            low, high = max(box[axis] - margin[axis], 0), min(box[axis + 2] - margin[axis], short)
            other = 1 - axis
            seen = max(box[other] - margin[other], 0) < min(box[other + 2] - margin[other], short)
            if low < high and seen:
                assert first * short / PX <= low + 1e-6
                assert (first + cropped_box.height) * short / PX >= high - 1e-6
        assert cropped_box.height >= 16 or cropped_box.height == PX
        assert cropped_box.height * short / PX >= min(16, short) - 1e-6, "as many pixels of the original"
        moved += cropped_box.height < PX
    assert moved > 1500, "the property is not held by cutting nothing"


@pytest.mark.parametrize(("min_scale", "max_scale", "low", "high"), [(0.25, 1.0, 24, 48), (0.3, 0.7, 27, 40)])
def test_areas_are_uniform_between_the_limits(min_scale: float, max_scale: float, low: int, high: int) -> None:
    crops = make_crop(min_scale=min_scale, max_scale=max_scale)
    numbers = (np.arange(20_000) + 0.5) / 20_000
    sides = Counter(crops.box(FRAME, [0.0, u, 0.0, 0.0], ImageInfo(640, 480)).height for u in numbers.tolist())
    assert (min(sides), max(sides)) == (low, high)
    for side, count in sides.items():
        assert abs(count / 20_000 - (2 * side + 1) / ((high + 1) ** 2 - low**2)) <= 1 / 20_000


def test_every_allowed_place_is_as_likely() -> None:
    crops = make_crop(min_scale=(40 / 48) ** 2, max_scale=(40 / 48) ** 2)
    numbers = ((np.arange(900) + 0.5) / 900).tolist()
    plain, boxed = ImageInfo(480, 480), ImageInfo(480, 480, "x", (50, 0, 420, 10))
    for image, places in ((plain, range(9)), (boxed, range(2, 6))):
        lefts = Counter(crops.box(FRAME, [0.0, 0.5, 0.0, u], image).left for u in numbers)
        assert lefts == dict.fromkeys(places, 900 // len(places))
    assert {crops.box(FRAME, [0.0, 0.5, u, 0.0], boxed).top for u in numbers} == {0}


def test_the_limits_of_detail_and_writing_are_stronger_than_the_largest_scale() -> None:
    small = {"min_scale": 0.01, "max_scale": 0.01}
    ends: list[list[float]] = [[0.0, u, u, u] for u in (0.0, 0.999999)]
    for numbers in ends:
        assert make_crop(**small).box(FRAME, numbers, ImageInfo(500, 500)).height == 16, "no stored pixel is upsampled"
        assert make_crop(**small).box(FRAME, numbers, ImageInfo(24, 30)).height == 32, "nor one of the original, of 24"
        assert make_crop(**small).box(FRAME, numbers, ImageInfo(9, 9)) == CropBox(0, 0, PX, PX)
        assert make_crop(**small, min_px=2).box(FRAME, numbers, ImageInfo(500, 500)).height == 32
        assert make_crop(**small, min_px=0).box(FRAME, numbers, ImageInfo(9, 9)).height == 5
        wide = ImageInfo(480, 480, "x", (100, 100, 400, 110))
        assert make_crop(**small).box(FRAME, numbers, wide).height == 30


def test_images_without_writing_have_settings_of_their_own() -> None:
    crops = make_crop(probability=0.5, without_text={"min_scale": 0.25, "max_scale": 0.25})
    boxed = ImageInfo(480, 480, "x", (0, 0, 1, 1))
    assert crops.box(FRAME, [0.49, 0.0, 0.0, 0.0], boxed).height == 42
    assert crops.box(FRAME, [0.50, 0.0, 0.0, 0.0], boxed) == CropBox(0, 0, PX, PX), "shown in full"
    assert crops.box(FRAME, [0.0, 0.5, 0.5, 0.5], ImageInfo(480, 480, "x")) == CropBox(0, 0, PX, PX), "unknown place"
    for image in (ImageInfo(480, 480, ""), ImageInfo(480, 480), ImageInfo(480, 480, "", (0, 0, 9, 9))):
        assert crops.box(FRAME, [0.99, 0.0, 0.0, 0.0], image).height == 24
    assert crops.box(FRAME, [0.50, 0.0, 0.0, 0.0], ImageInfo(480, 480, None, (0, 0, 9, 9))) == CropBox(0, 0, PX, PX)


def test_a_crop_of_a_bucket_keeps_its_ratio_and_the_writing() -> None:
    shape = (72, 56)  # of 64 px
    frame = RandomResizedCrop(make_crop().config.model_copy(update={"from_px": 64}), np.zeros).layout(
        [32], lambda _: shape
    )[32]
    assert frame == Frame(64, shape, (36, 28))
    rng = np.random.default_rng(4)
    written = 0
    for numbers in random_rows(300):
        height = int(rng.integers(200, 900))
        image = ImageInfo(int(height * rng.uniform(0.6, 1.2)), height)
        box = make_crop(min_scale=0.3, max_scale=0.8).box(frame, numbers.tolist(), image)
        assert 0 <= box.top <= box.top + box.height <= 72
        assert 0 <= box.left <= box.left + box.width <= 56
        assert abs(box.height / box.width - 72 / 56) < 0.5 / box.width + 0.5 / box.height * 72 / 56
        assert box.height * box.width >= 0.28 * 72 * 56
        x, y = (sorted(rng.integers(0, side, 2).tolist()) for side in (image.width, image.height))
        text = ImageInfo(image.width, image.height, "text", (x[0], y[0], x[1] + 1, y[1] + 1))
        left, top, right, bottom = stored_box(text, shape)
        box = make_crop(min_scale=0.05, max_scale=0.6).box(frame, numbers.tolist(), text)
        if right > left:
            assert box.left <= left < right <= box.left + box.width
            assert box.top <= top < bottom <= box.top + box.height
            written += 1
    assert written > 200


def test_a_crop_of_a_bucket_to_parts_of_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole number of pixels"):
        make_crop().layout([20], lambda _: (56, 40))


def test_only_images_without_writing_are_flipped() -> None:
    flip = Flipped(make_crop(), 0.3, lambda numbers: np.empty((0, 1)))
    for numbers in ([0.29, 0.0, 0.5, 0.5, 0.5], [0.3, 0.0, 0.5, 0.5, 0.5]):
        for image, may in (
            (ImageInfo(480, 480), True),
            (ImageInfo(480, 480, ""), True),
            (ImageInfo(480, 480, "", (1, 2, 3, 4)), True),
            (ImageInfo(480, 480, "x"), False),
            (ImageInfo(480, 480, "x", (1, 2, 3, 4)), False),
            (ImageInfo(480, 480, None, (1, 2, 3, 4)), False),
        ):
            for cropped_box in flip.boxes(SIZES, numbers, image).values():
                assert cropped_box.flipped == (may and numbers[0] < 0.3)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_crop_is_resized_as_pillow_does_and_unchanged_at_its_own_size(flipped: bool) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (PX, PX, 3), dtype=np.uint8)
    part = Image.fromarray(pixels).crop((7, 3, 47, 43))
    turned = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else part
    cropped_box = CropBox(3, 7, 40, 40, flipped)
    assert np.array_equal(cropped_box.show(pixels, (40, 40)), np.asarray(turned))
    for size in (16, 39, 64):
        expected = np.asarray(turned.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(cropped_box.show(pixels, (size, size)) - expected).max() <= 2


def test_a_safebox_is_counted_in_pixels_of_the_stored_centre_square() -> None:
    assert stored_box(ImageInfo(600, 480, "x", (160, 100, 360, 220)), (PX, PX)) == (10, 10, 30, 22)
    assert stored_box(ImageInfo(480, 600, "x", (160, 161, 360, 221)), (PX, PX)) == (16, 10, 36, 17), "grown"
    assert stored_box(ImageInfo(600, 480, "x", (-5, -5, 9999, 9999)), (PX, PX)) == (0, 0, PX, PX)
    assert stored_box(ImageInfo(600, 480, "x", (160, 100, 360, 220)), (40, 50)) == (13, 8, 30, 19), "of a bucket"
    assert stored_box(ImageInfo(600, 480, "x", (0, 0, 60, 480)), (PX, PX)) == (0, 0, 0, 0), (
        "cropped away by precompute"
    )


def test_a_full_image_at_its_own_size_has_the_stored_pixels(written_store: Path) -> None:
    full = {"from_px": PX, "min_scale": 1, "max_scale": 1}
    config = make_config(written_store, denoiser=BASE | {"size_px": PX}, views={"resized_crop": full})
    plain = make_config(written_store, denoiser=BASE | {"size_px": PX})
    for a, b in zip(read(config, 5), read(plain, 5), strict=True):
        assert torch.equal(a.images[PX], b.images[PX])


def test_both_images_of_super_resolution_show_one_crop_of_the_larger_image(written_store: Path) -> None:
    """The crop is found by trying all possible ones."""
    augment = {"from_px": PX, "min_scale": 0.7, "without_text": {"min_scale": 0.8, "max_scale": 0.9}}
    config = make_config(written_store, denoiser=PLAIN_SUPER, views={"resized_crop": augment, "horizontal_flip": True})
    images = {sample.key: sample for sample in Store.open(written_store)}
    crops = [
        CropBox(top, left, side, side, flipped)
        for side in range(40, PX + 1)
        for top in range(PX - side + 1)
        for left in range(PX - side + 1)
        for flipped in (False, True)
    ]
    (batch,) = read(config, 1)
    kinds = Counter[str]()
    for k, key in enumerate(batch.keys):
        large, small = (batch.images[size][k].permute(1, 2, 0).numpy() for size in (32, 16))
        pixels = images[key].images[PX]
        (cropped_box,) = [
            cropped_box for cropped_box in crops if np.array_equal(cropped_box.show(pixels, (32, 32)), large)
        ]
        assert np.array_equal(cropped_box.show(pixels, (16, 16)), small)
        written, box = images[key].transcription, images[key].safebox
        if written and box is None:
            assert cropped_box == CropBox(0, 0, PX, PX)
        elif written:
            assert not cropped_box.flipped
        else:
            assert 43 <= cropped_box.height <= 45
        kinds["text" if written else "flipped" if cropped_box.flipped else "plain"] += 1
    assert min(kinds.values()) >= 1
    assert len(kinds) == 3
    shown = example(config, batch)
    assert torch.equal(shown.x0, batch.images[32].double() / 127.5 - 1)


def test_views_do_not_depend_on_batches_processes_or_restarts(written_store: Path) -> None:
    settings: dict[str, Any] = {
        "denoiser": PLAIN_SUPER,
        "views": {
            "resized_crop": {"from_px": PX, "min_scale": 0.2},
            "horizontal_flip": 0.5,
            "low_res_blur": {"probability": 0.5, "sigma": [0.4, 0.6], "kernel": 5},
        },
        "seed": 3,
    }
    config = make_config(written_store, batch_size=6, **settings)
    full = read(config, 14)  # two epochs, with short batches at their ends
    one_by_one = read(config.model_copy(update={"batch_size": 1}), 80)
    ranks = [read(config, 14, World(rank, 3, CPU)) for rank in range(3)]
    resumed = read(config, 9, state=full[4].loader_state)
    for size in (32, 16):
        straight = torch.cat([batch.images[size] for batch in full])
        assert torch.equal(torch.cat([batch.images[size] for batch in one_by_one]), straight)
        parts = [part.images[size] for step in zip(*ranks, strict=True) for part in step]
        assert torch.equal(torch.cat(parts), straight)
        assert torch.equal(torch.cat([batch.images[size] for batch in resumed]), straight[30:])
        assert not torch.equal(straight[:40], straight[40:]), "another view in every epoch"
    low_res = [example(config, batch).conditioning.low_res for batch in full[:3]]
    alone = [example(config, batch).conditioning.low_res for batch in one_by_one[:18]]
    assert all(part is not None for part in (*low_res, *alone))
    assert torch.equal(torch.cat(low_res), torch.cat(alone))  # type: ignore[arg-type]


def test_grids_are_sampled_from_full_images(written_store: Path) -> None:
    config = make_config(
        written_store, denoiser=PLAIN_SUPER, views={"resized_crop": {"from_px": PX, "min_scale": 0.2}}
    )
    loader = Store.open(written_store).loader(3, [16], shuffle=False, crop=full_images(config))
    for row, pixels in enumerate(next(iter(loader))["images"][16]):
        stored = Image.fromarray(Store.open(written_store)[row].images[PX])
        expected = np.asarray(stored.resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() <= 2


@pytest.mark.slow
def test_a_training_on_crops_resumes_after_a_stop_as_if_it_had_not_stopped(
    written_store: Path, tmp_path: Path
) -> None:
    config = make_config(
        written_store,
        views={"resized_crop": {"from_px": PX, "without_text": {"min_scale": 0.2}}, "horizontal_flip": 0.5},
        batch_size=2,
        num_steps=2,
        validation={"num_samples": 2},
        grid={"every_steps": 2, "num_images": 1, "num_steps": 1},
    )
    straight = train(config, tmp_path / "straight")
    train(config.model_copy(update={"num_steps": 1}), tmp_path / "cut")
    resumed = train(config, tmp_path / "cut")
    assert math.isfinite(straight["validation_loss"])
    assert (resumed["loss"], resumed["validation_loss"]) == (straight["loss"], straight["validation_loss"])


def test_blur_is_a_gaussian_of_the_stated_width_on_the_stated_part() -> None:
    config = BlurConfig(probability=0.3, sigma=(0.4, 0.8), kernel=5)
    spot = torch.zeros(4, 1, 9, 9, dtype=torch.float64)
    spot[:, :, 4, 4] = 1
    uniform = torch.tensor([[0.1, 0.0], [0.29, 0.5], [0.3, 0.5], [0.9, 0.9]], dtype=torch.float64)
    blurred = blur(spot, config, uniform)
    assert torch.equal(blurred[2:], spot[2:])
    for row, sigma in ((0, 0.4), (1, 0.6)):
        line = torch.exp(-(torch.arange(-2.0, 3.0, dtype=torch.float64) ** 2) / (2 * sigma**2))
        expected = torch.outer(line, line) / line.sum() ** 2
        torch.testing.assert_close(blurred[row, 0, 2:7, 2:7], expected)
        assert float(blurred[row].sum()) == pytest.approx(1)
    flat = torch.full((2, 3, 4, 4), 0.7, dtype=torch.float64)
    torch.testing.assert_close(blur(flat, BlurConfig(), torch.zeros(2, 2, dtype=torch.float64)), flat)


def test_the_low_resolution_image_alone_is_blurred_in_training_at_the_stated_rate(written_store: Path) -> None:
    plain = make_config(written_store, denoiser=PLAIN_SUPER | {"size_px": 48, "low_res_px": 24}, batch_size=40)
    config = make_config(
        written_store, denoiser=plain.denoiser, batch_size=40, views={"low_res_blur": {"probability": 0.3}}
    )
    blurred = 0
    for batch in read(plain, 10):
        a, b = example(plain, batch), example(config, batch)
        assert torch.equal(a.x0, b.x0)
        assert a.conditioning.low_res is not None
        assert b.conditioning.low_res is not None
        same = (a.conditioning.low_res == b.conditioning.low_res).flatten(1).all(1)
        blurred += int((~same).sum())
    assert abs(blurred / 400 - 0.3) < 0.07


def test_the_low_resolution_image_alone_loses_its_colours_at_the_stated_rate(written_store: Path) -> None:
    plain = make_config(written_store, denoiser=PLAIN_SUPER | {"size_px": 48, "low_res_px": 24}, batch_size=40)
    config = changed(plain, views={"low_res_grayscale": 0.3})
    num_grayscale = 0
    for batch in read(plain, 10):
        a, b = example(plain, batch), example(config, batch)
        assert torch.equal(a.x0, b.x0)
        assert a.conditioning.low_res is not None
        assert b.conditioning.low_res is not None
        for before, after in zip(a.conditioning.low_res, b.conditioning.low_res, strict=True):
            if torch.equal(before, after):
                continue
            num_grayscale += 1
            luma = 0.299 * before[0] + 0.587 * before[1] + 0.114 * before[2]
            assert torch.equal(after[0], after[1])
            assert torch.equal(after[0], after[2])
            assert ((after[0] - luma).abs() < 1e-9).double().mean() > 0.95, "but where upsampling was clipped"
    assert abs(num_grayscale / 400 - 0.3) < 0.07


def test_horizontal_flip_true_means_half_and_a_number_that_fraction() -> None:
    found = [ViewsConfig(horizontal_flip=value).horizontal_flip for value in (True, False, 0.25)]
    assert found == [0.5, 0.0, 0.25]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"views": {"resized_crop": {"from_px": 8}}},
            r"resized_crop\.from_px 8 is smaller than denoiser.size_px 16",
        ),
        (
            {"views": {"resized_crop": {"from_px": 48, "min_scale": 0.9, "max_scale": 0.8}}},
            "min_scale 0.9 is larger than max_scale",
        ),
        ({"views": {"resized_crop": {"from_px": 48, "without_text": {"min_scale": 0}}}}, "without_text.min_scale"),
        ({"denoiser": SUPER, "views": {"crop_px": 16, "resized_crop": {"from_px": 48}}}, "two ways to crop an image"),
        ({"views": {"low_res_blur": {}}}, r"views\.low_res_blur is for super-resolution"),
        ({"denoiser": SUPER, "views": {"low_res_blur": {"kernel": 4}}}, r"kernel: must be odd \(got 4\)"),
        (
            {"denoiser": SUPER, "views": {"low_res_blur": {"sigma": [0.6, 0.4]}}},
            r"sigma: must be above 0 and not fall",
        ),
        ({"views": {"horizontal_flip": 1.5}}, "horizontal_flip"),
        ({"views": {"low_res_grayscale": 0.5}}, r"views\.low_res_grayscale is for super-resolution"),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(Path("store"), **changes)


def test_a_store_without_the_size_to_crop_is_refused(written_store: Path) -> None:
    with pytest.raises(TrainError, match=r"no images-96 \(sizes: \[24, 48\]\).*views\.resized_crop\.from_px"):
        open_stores(make_config(written_store, views={"resized_crop": {"from_px": 96}}))
