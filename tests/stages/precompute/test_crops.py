"""What stored images do not show of their originals."""

import pytest

from imagen_core.store import bucket_shapes
from pipeline.engine.tally import GroupTally
from pipeline.storage.record import Record
from stages.precompute.crops import crop_counters, crops_line, crops_of, measured
from stages.precompute.images_config import ImagesConfig

SHAPES = bucket_shapes(32)
"""40 x 24, 32 x 32 and 24 x 40, height first."""


def test_the_part_that_squares_and_buckets_cut_off_is_a_mean_over_images() -> None:
    crops = measured([(500, 300), (300, 300), (100, 400), (0, 0)], SHAPES, stored=True)
    assert crops["images"] == 3
    assert crops["square"] == pytest.approx((0.4 + 0 + 0.75) / 3)
    assert crops["buckets"] == pytest.approx((0 + 0 + (1 - 0.25 / 0.6)) / 3)
    assert crops["histogram"] == {"24x40": 1, "32x32": 1, "40x24": 1}
    assert list(crops["histogram"]) == ["24x40", "32x32", "40x24"], "from the tallest to the widest"


def test_counters_of_shards_merge_to_those_of_the_whole() -> None:
    sizes, tally = [(500, 300), (300, 300), (100, 400)], GroupTally()
    for part in (sizes[:1], sizes[1:], []):
        tally.add(Record("samples", 0, "", "", 0, 0, counters=crop_counters(part, SHAPES, stored=True)))
    found, whole = crops_of(tally.counters), measured(sizes, SHAPES, stored=True)
    assert found["histogram"] == whole["histogram"]
    assert (found["images"], found["square"], found["buckets"]) == pytest.approx(
        (whole["images"], whole["square"], whole["buckets"])
    )


def test_the_line_says_what_squares_lose_and_what_buckets_would() -> None:
    sizes = [(500, 300), (300, 300)]
    assert crops_line(measured(sizes, SHAPES, stored=False)) == (
        "squares cut off 20.0% of an image on average; images.aspect=buckets would cut off 0.0%"
    )
    assert crops_line(measured(sizes, (), stored=False)) == "squares cut off 20.0% of an image on average"
    assert crops_line(measured(sizes, SHAPES, stored=True)) == (
        "0.0% of an image is cut off on average, by squares it would be 20.0%; 32x32 50.0%, 40x24 50.0%"
    )
    assert crops_of({"captions": 3.0}) == {}, "of an earlier version"


def test_what_buckets_would_be_follows_from_the_smallest_size() -> None:
    assert ImagesConfig(sizes_px=(64, 100)).possible_shapes() == bucket_shapes(64)
    assert ImagesConfig(sizes_px=(100,)).possible_shapes() == bucket_shapes(96)
    assert ImagesConfig(sizes_px=(16, 64)).possible_shapes() == (), "16 px have no shape but the square"
    assert ImagesConfig(sizes_px=(4,)).possible_shapes() == ImagesConfig(sizes_px=()).possible_shapes() == ()
