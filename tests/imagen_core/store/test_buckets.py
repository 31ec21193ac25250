"""Buckets: the shapes, which one an image gets, and the part of it that is kept."""

import numpy as np
import pytest

from imagen_core.store.buckets import Shape, bucket_shapes, choose_buckets, crop_box, scaled, shapes_difference


@pytest.mark.parametrize("size_px", [64, 72, 128, 256, 512, 1024])
def test_shapes_have_sides_of_8_and_the_area_and_ratio_asked_for(size_px: int) -> None:
    shapes = bucket_shapes(size_px)
    assert (size_px, size_px) in shapes
    assert 5 <= len(shapes) <= 30
    for height, width in shapes:
        assert height % 8 == width % 8 == 0
        assert abs(height * width / size_px**2 - 1) <= 0.1
        assert max(height, width) <= 2 * min(height, width)
        assert (width, height) in shapes


def test_shapes_of_64_px() -> None:
    assert bucket_shapes(64) == ((88, 48), (80, 48), (72, 56), (64, 64), (56, 72), (48, 80), (48, 88))
    assert bucket_shapes(64, max_ratio=1.5) == ((72, 56), (64, 64), (56, 72))
    assert scaled(bucket_shapes(64), 64, 256)[0] == (352, 192)


@pytest.mark.parametrize(("size_px", "max_ratio", "says"), [(60, 2.0, "multiple of 8"), (64, 0.5, "1 or more")])
def test_sizes_and_ratios_without_buckets_are_refused(size_px: int, max_ratio: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bucket_shapes(size_px, max_ratio)


def test_a_size_that_scales_to_parts_of_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole number of pixels"):
        scaled(bucket_shapes(64), 64, 100)


def test_the_bucket_is_the_one_that_keeps_most_of_the_image() -> None:
    shapes, dice = bucket_shapes(64), np.random.default_rng(0)
    widths, heights = dice.integers(1, 3000, (2, 500))
    found = choose_buckets(widths, heights, shapes)
    for width, height, bucket in zip(widths.tolist(), heights.tolist(), found.tolist(), strict=True):
        # The part that a shape keeps of an image, by the largest rectangle of its ratio that fits.
        kept = [min(width / w, height / h) ** 2 * w * h / (width * height) for h, w in shapes]
        assert kept[bucket] == pytest.approx(max(kept))


def test_the_kept_part_is_centred_and_as_large_as_can_be() -> None:
    assert crop_box(640, 480, (64, 64)) == (80, 0, 560, 480)
    assert crop_box(641, 480, (64, 64)) == (80, 0, 560, 480)
    assert crop_box(480, 640, (64, 64)) == (0, 80, 480, 560)
    assert crop_box(640, 480, (56, 72)) == (11, 0, 628, 480)
    assert crop_box(1, 1000, (88, 48)) == (0, 499, 1, 501)


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ((), bucket_shapes(64), "images.aspect: square -> buckets"),
        (bucket_shapes(64), scaled(bucket_shapes(32), 32, 64), "images.aspect_base_px: 64 -> 32"),
        (scaled(bucket_shapes(128), 128, 256), bucket_shapes(64), "images.aspect_base_px: 128 -> 64"),
        (bucket_shapes(256), bucket_shapes(64), "images.aspect_base_px: 128 -> 64"),  # 128 has the shapes of 256
        (bucket_shapes(64), bucket_shapes(64, 1.5), "images.max_aspect_ratio: 1.83 -> 1.29"),
        (((8, 24), (16, 16)), ((16, 16),), "width:height of the buckets: 3:1, 1:1 -> 1:1"),
    ],
)
def test_what_differs_between_two_lists_of_shapes_is_told_by_the_setting(
    one: tuple[Shape, ...], other: tuple[Shape, ...], says: str
) -> None:
    assert shapes_difference(one, other) == says
