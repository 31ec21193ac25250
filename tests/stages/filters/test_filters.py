"""What filters decide, and how a list of them is completed."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from imagen_core.store import Store
from pipeline.errors import ConfigError
from stages.filters.base import FilterRow, Rejection
from stages.filters.keep_rate import KeepRate
from stages.filters.registry import AnyFilters
from stages.filters.size import MaxPixels, MaxSide, MinBytes, TooSmall
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


def test_max_side_rejects_by_the_longer_side() -> None:
    assert MaxSide(max=90).reject(row(90, 64)) is None
    rejected = Rejection("side_too_long", "64 x 91 px, at most 90 allowed")
    assert MaxSide(max=90).reject(row(64, 91)) == rejected


def test_min_bytes_rejects_small_files_but_not_the_lack_of_one() -> None:
    assert MinBytes(min=4).reject(row(9, 9)) is None
    assert MinBytes(min=5).reject(row(9, 9)) == Rejection("file_too_small", "4 bytes, 5 needed")
    assert MinBytes(min=5).reject(FilterRow("key", None, ("text",), b"", ())) is None


def keyed(number: int, **columns: object) -> FilterRow:
    return FilterRow(f"key-{number}", None, ("a caption",), b"file", (), annotations={"columns": columns})


def kept(filter: KeepRate, **columns: object) -> set[int]:
    return {number for number in range(2000) if filter.reject(keyed(number, **columns)) is None}


def test_keep_rate_keeps_its_part_by_seed_and_key_and_more_at_a_higher_rate() -> None:
    third, half = kept(KeepRate(rate=0.33)), kept(KeepRate(rate=0.5))
    assert len(half) == pytest.approx(1000, abs=80)
    assert third < half
    other = kept(KeepRate(rate=0.5, seed=1))
    assert len(half & other) == pytest.approx(500, abs=80), "seeds are independent"
    assert len(kept(KeepRate(rate=1))) == 2000
    assert not kept(KeepRate(rate=0))


def test_keep_rate_multiplies_with_the_probability_of_a_column() -> None:
    by_column = KeepRate(column="share")
    assert kept(by_column, share=0.25) == kept(KeepRate(rate=0.25))
    assert kept(KeepRate(rate=0.5, column="share"), share=0.5) == kept(KeepRate(rate=0.25))
    assert len(kept(by_column, share=None)) == 2000, "NULL is no reason to drop a row"
    assert not kept(by_column, share=float("nan"))


def test_keep_rate_refuses_columns_that_are_not_kept_or_hold_text() -> None:
    ResizeStage(ImagesConfig(), "parquet", [MaxPixels(), KeepRate(column="share")], columns={"share": "float"})
    with pytest.raises(ConfigError, match=r"'share', which is not kept of the source \(kept: \['x'\]\); name it in"):
        KeepRate(column="share").check({"x": "int"})
    with pytest.raises(ConfigError, match=r"'share', which holds text; name one of numbers"):
        KeepRate(column="share").check({"share": "text"})


def test_a_run_keeps_rows_by_the_probability_in_their_column(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    lines = ["file,caption,share"]
    for number in range(6):
        (images / f"{number}.png").write_bytes(plain_png(size_px=20 + number))
        lines.append(f"{number}.png,words,{number % 2}")
    (images / "captions.csv").write_text("\n".join(lines))
    result = precompute(
        tmp_path / "run",
        "source.kind=folder",
        f"source.path={images}",
        "source.keep_columns={share: float}",
        "images.sizes_px=[16]",
        "filters=[{kind: keep_rate, column: share}, {kind: max_side, max: 24}]",
        "encoders=[]",
        "max_drop_fraction=1",
    )
    assert result.code == 0, result.err
    assert [sample.key for sample in Store.open(tmp_path / "run/store")] == ["1.png", "3.png"]
    thinned = [(f"{number}.png", "thinned_out") for number in (0, 2, 4)]
    assert drops(tmp_path / "run") == sorted([*thinned, ("5.png", "side_too_long")])


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
