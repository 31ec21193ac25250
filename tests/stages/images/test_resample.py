"""Crop and resize against Pillow, and against what antialiasing must do."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagen_core.store.buckets import bucket_shapes, choose_shape, crop_box, scaled
from stages.images import Filter, center_square, decode_rgb, pyramid, pyramid_of_shapes, resize_square

FILTERS: dict[Filter, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
}
EMOJI = Path(__file__).parents[3].parent / "shared/data/noto-emoji/images"


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo_like(height: int, width: int) -> np.ndarray:
    """Colour ramps, a soft disc with a sharp ring, and a little grain."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    distance = np.hypot(x - 0.45, y - 0.4)
    disc = 120 / (1 + np.exp((distance - 0.2) * 60)) + 60 * ((distance > 0.3) & (distance < 0.32))
    ramps = np.stack([200 * x, 180 * y, 90 * (x + y)], axis=-1)
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return np.clip(ramps + disc[..., None] + grain, 0, 255).astype(np.uint8)


def zone_plate(size: int, nyquist_radius: float) -> np.ndarray:
    """Rings whose frequency grows with the radius, to 0.5 cycles/pixel at `nyquist_radius` * size."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    phase = np.pi * (x * x + y * y) / (2 * nyquist_radius * size)
    return np.repeat((127.5 + 127.5 * np.cos(phase))[..., None], 3, axis=-1).round().astype(np.uint8)


def pillow_resize(pixels: np.ndarray, size_px: int, filter: Filter) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((size_px, size_px), FILTERS[filter]))


def max_difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


SIDES = [
    (768, 64),  # whole ratio
    (768, 256),
    (1000, 256),  # broken ratio
    (130, 64),
    (513, 256),
    (300, 256),  # less than half
    (65, 64),
    (255, 256),  # enlarging
    (3, 64),
    (1, 64),
    (64, 200),
    (7, 1),
]


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("side", "size_px"), SIDES)
@pytest.mark.parametrize("make", [noise, photo_like])
def test_resize_is_within_one_level_of_pillow(make, side, size_px, filter):
    pixels = make(side, side)
    assert max_difference(resize_square(pixels, size_px, filter), pillow_resize(pixels, size_px, filter)) <= 1


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(
    ("side", "size_px"), [pytest.param(4000, 64, marks=pytest.mark.slow), (600, 256), (512, 256), (200, 64)]
)
def test_zone_plate_is_within_one_level_of_pillow(side, size_px, filter):
    pixels = zone_plate(side, nyquist_radius=0.5)
    assert max_difference(resize_square(pixels, size_px, filter), pillow_resize(pixels, size_px, filter)) <= 1


@pytest.mark.parametrize("size_px", [64, 128, 200])
def test_stripes_are_at_most_two_levels_off_pillow_and_rarely(size_px):
    """The known worst case of torch's 16-bit weights: every row is one of two patterns."""
    rng = np.random.default_rng(0)
    patterns, choice = rng.integers(0, 256, (2, 1, 400, 3)), rng.integers(0, 2, (400, 1, 1))
    pixels = np.where(choice, patterns[0], patterns[1]).astype(np.uint8)
    difference = np.abs(resize_square(pixels, size_px).astype(int) - pillow_resize(pixels, size_px, "bicubic"))
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-4


@pytest.mark.parametrize("size_px", [64, 256, 512])
def test_saturated_noise_overshoots_like_pillow(size_px):
    """Black and white pixels make the filter overshoot: both passes must clip."""
    pixels = (noise(512, 512) // 128 * 255).astype(np.uint8)
    assert max_difference(resize_square(pixels, size_px), pillow_resize(pixels, size_px, "bicubic")) <= 1


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_flat_colour_stays_exact(filter, level):
    out = resize_square(np.full((333, 333, 3), level, np.uint8), 64, filter)
    assert (out == level).all()


def test_box_by_a_whole_ratio_is_the_mean():
    pixels = noise(64, 64)
    mean = pixels.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3))
    assert np.abs(resize_square(pixels, 8, "box") - mean).max() <= 1.01  # two roundings


@pytest.mark.parametrize("filter", FILTERS)
def test_frequencies_above_the_new_nyquist_become_flat_grey(filter):
    """512 -> 64 keeps up to 1/16 cycles/pixel. The outer rings are at 0.3 to 0.5, and must not alias."""
    pixels = zone_plate(512, nyquist_radius=0.5)
    y, x = np.mgrid[:64, :64] - 31.5
    radius = np.hypot(x, y)
    ring = (radius > 0.6 * 32) & (radius < 30)
    resized = resize_square(pixels, 64, filter)[ring].astype(float)
    nearest = pixels[4::8, 4::8][ring].astype(float)
    assert nearest.std() > 80
    assert resized.std() < {"box": 16, "bilinear": 3, "bicubic": 3, "lanczos": 3}[filter]
    assert abs(resized.mean() - 127.5) < 2


def test_same_size_is_an_exact_copy():
    pixels = noise(64, 64)
    out = resize_square(pixels, 64)
    assert (out == pixels).all()
    assert not np.shares_memory(out, pixels)


@pytest.mark.parametrize(
    ("shape", "top", "left", "side"),
    [((4, 7), 0, 1, 4), ((7, 4), 1, 0, 4), ((5, 5), 0, 0, 5), ((6, 2), 2, 0, 2), ((1, 9), 0, 4, 1)],
)
def test_center_square_floors_the_offset_and_copies_nothing(shape, top, left, side):
    pixels = noise(*shape)
    square = center_square(pixels)
    assert np.shares_memory(square, pixels)
    assert (square == pixels[top : top + side, left : left + side]).all()


@pytest.mark.parametrize(("height", "width"), [(768, 1024), (1023, 767), (300, 301), (100, 40)])
@pytest.mark.parametrize("make", [noise, photo_like])
def test_pyramid_equals_pillow_crop_and_resize_of_the_whole_image(make, height, width):
    pixels = make(height, width)
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.fromarray(pixels).crop((left, top, left + side, top + side))
    levels = pyramid(pixels, (64, 256))
    assert list(levels) == [64, 256]
    for size_px, level in levels.items():
        assert level.dtype == np.uint8
        assert level.flags.c_contiguous
        assert level.flags.writeable
        expected = np.asarray(square.resize((size_px, size_px), Image.Resampling.BICUBIC))
        assert max_difference(level, expected) <= 1


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(
    ("height", "width"), [(768, 1024), (1023, 767), (600, 401), (130, 190), (2000, 200), (1, 300), (40, 30)]
)
@pytest.mark.parametrize("make", [noise, photo_like])
def test_images_of_a_bucket_equal_pillow_crop_and_resize_of_the_whole_image(make, height, width, filter):
    """Also where they grow, and where no bucket is near: 10:1 is cut to 2:1."""
    pixels = make(height, width)
    shape = choose_shape(width, height, bucket_shapes(64))
    box = crop_box(width, height, shape)
    shapes = {size: (shape[0] * size // 64, shape[1] * size // 64) for size in (64, 256)}
    for size, level in pyramid_of_shapes(pixels, shapes, filter).items():
        assert level.shape == (*shapes[size], 3)
        assert level.flags.c_contiguous
        expected = Image.fromarray(pixels).crop(box).resize(shapes[size][::-1], FILTERS[filter])
        assert max_difference(level, np.asarray(expected)) <= 1


def test_the_sizes_of_a_bucket_show_the_same_part():
    """A mark at the edge of the crop is at the edge of every size, however the crop is rounded."""
    pixels = noise(601, 901)
    crops = {}
    for base in (64, 256):
        shape = choose_shape(901, 601, scaled(bucket_shapes(64), 64, base))
        crops[base] = crop_box(901, 601, shape)
        left, top, right, bottom = crops[base]
        whole = pyramid_of_shapes(pixels, {base: shape}, "box")[base]
        assert np.array_equal(whole, pyramid_of_shapes(pixels[top:bottom, left:right], {base: shape}, "box")[base])
    assert crops[64] == crops[256]


def test_pyramid_computes_each_size_from_the_original():
    pixels = noise(200, 200)
    levels = pyramid(pixels, (70, 64))
    assert (levels[64] == resize_square(pixels, 64)).all()
    assert max_difference(levels[64], resize_square(levels[70], 64)) > 5


def test_output_does_not_depend_on_memory_layout():
    wide = noise(300, 500)
    view = wide[:, 100:400]
    frozen = np.ascontiguousarray(view)
    frozen.flags.writeable = False
    for filter in FILTERS:
        expected = resize_square(view.copy(), 64, filter)
        assert (resize_square(view, 64, filter) == expected).all()
        assert (resize_square(frozen, 64, filter) == expected).all()


@pytest.mark.parametrize(
    ("pixels", "size_px", "filter", "message"),
    [
        (np.zeros((4, 5, 3), np.uint8), 2, "bicubic", "center_square"),
        (np.zeros((4, 4), np.uint8), 2, "bicubic", "uint8"),
        (np.zeros((4, 4, 3), np.float32), 2, "bicubic", "float32"),
        (np.zeros((0, 0, 3), np.uint8), 2, "bicubic", "uint8"),
        (np.zeros((4, 4, 3), np.uint8), 0, "bicubic", "got 0"),
        (np.zeros((4, 4, 3), np.uint8), 2, "area", "'area'"),
    ],
)
def test_wrong_arguments_are_named(pixels, size_px, filter, message):
    with pytest.raises(ValueError, match=message):
        resize_square(pixels, size_px, filter)


@pytest.mark.skipif(not EMOJI.is_dir(), reason=f"no folder {EMOJI}")
def test_emoji_images_are_within_one_level_of_pillow():
    for path in sorted(EMOJI.glob("*.png"))[::160]:
        image = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        composite = Image.alpha_composite(white, image).convert("RGB")
        decoded = decode_rgb(path.read_bytes(), max_pixels=10**7)
        assert (decoded.pixels == np.asarray(composite)).all()
        for size_px, level in pyramid(decoded.pixels, (64, 256)).items():
            expected = np.asarray(composite.resize((size_px, size_px), Image.Resampling.BICUBIC))
            assert max_difference(level, expected) <= 1
