"""What filters decide, and how a list of them is completed."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from imagen_core.store import Store
from stages.filters.base import FilterRow, Rejection
from stages.filters.registry import AnyFilters
from stages.filters.size import MaxPixels, TooSmall
from stages.precompute.images_config import ImagesConfig
from stages.precompute.resize import ResizeStage
from tests.commands import drops, precompute
from tests.images import plain_png


def row(width: int, height: int, *sizes_px: int) -> FilterRow:
    return FilterRow("key", None, ("a caption",), b"file", sizes_px, np.zeros((height, width, 3), np.uint8))


def samples_config(*filters: object) -> dict[str, object]:
    chosen = TypeAdapter(AnyFilters).validate_python(filters)
    return dict(ResizeStage(ImagesConfig(), "parquet", chosen).groups[0].config)


def test_max_pixels_rejects_what_is_over_its_limit() -> None:
    assert MaxPixels(max=12).reject(row(4, 3)) is None
    assert MaxPixels(max=11).reject(row(4, 3)) == Rejection("too_many_pixels", "4 x 3 is over 11 pixels")


def test_too_small_compares_the_short_side_with_the_largest_size() -> None:
    assert TooSmall().reject(row(90, 64, 16, 64)) is None
    assert TooSmall().reject(row(90, 63, 16, 64)) == Rejection("too_small", "90 x 63 px, 64 needed")
    assert TooSmall(action="upscale").reject(row(90, 63, 16, 64)) is None
    assert TooSmall().reject(FilterRow("key", None, ("text",), b"", ())) is None


def test_max_pixels_and_too_small_come_first_in_every_list_with_their_defaults_or_as_named() -> None:
    adapter = TypeAdapter(AnyFilters)
    assert adapter.validate_python([]) == (MaxPixels(), TooSmall())
    named = adapter.validate_python([{"kind": "too_small", "action": "upscale"}])
    assert named == (MaxPixels(max=100_000_000), TooSmall(action="upscale"))


def test_a_filter_that_is_always_active_is_named_once_at_most() -> None:
    with pytest.raises(ValidationError, match="kind max_pixels is named 2 times; give it once"):
        TypeAdapter(AnyFilters).validate_python([{"kind": "max_pixels", "max": 5}, {"kind": "max_pixels", "max": 6}])


def test_the_fingerprint_of_samples_has_the_first_two_filters_as_stores_have_them() -> None:
    assert samples_config() == {"kind": "samples", "max_pixels": 100_000_000, "too_small": "drop"}
    named = samples_config({"kind": "max_pixels", "max": 99}, {"kind": "too_small", "action": "upscale"})
    assert named == {"kind": "samples", "max_pixels": 99, "too_small": "upscale"}


def test_max_pixels_drops_an_image_by_the_size_in_its_header(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, side in (("large", 40), ("small", 30)):
        data = plain_png(size_px=side)
        (images / f"{name}.png").write_bytes(data if name == "small" else data[:60])  # no pixel of it can be decoded
        (images / f"{name}.txt").write_text(name)
    result = precompute(
        tmp_path / "run",
        "source.kind=folder",
        f"source.path={images}",
        "images.sizes_px=[16]",
        "filters=[{kind: max_pixels, max: 900}]",
        "encoders=[{name: t5, model: tiny-random-t5}]",
    )
    assert result.code == 0, result.err
    assert drops(tmp_path / "run") == [("large.png", "too_many_pixels")]
    assert [sample.key for sample in Store.open(tmp_path / "run/store")] == ["small.png"]
