"""Sizes of originals that a plan knows before anything is fetched."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import load_config
from pipeline.options import PlanOptions
from stages.sources.original_sizes import original_sizes
from workflows.precompute import Precompute, PrecomputeConfig

URLS = [f"https://example.com/{number}.jpg" for number in range(6)]
SIZES = [(640, 480), (300, 300), (480, 640), (900, 300), (0, 5), (float("nan"), 5.0)]


def plan(out: Path, *overrides: str) -> dict[str, Any]:
    workflow = Precompute(load_config(PrecomputeConfig, None, ["encoders=[]", *overrides]))
    return workflow.preview(str(out), PlanOptions())


def table(names: tuple[str, str]) -> pa.Table:
    columns = {name: pa.array([float(size[place]) for size in SIZES]) for place, name in enumerate(names)}
    return pa.table({"url": URLS, "caption": ["a caption"] * 6, **columns})


@pytest.mark.parametrize("names", [("width", "height"), ("WIDTH", "HEIGHT"), ("original_width", "original_height")])
def test_a_plan_of_a_list_counts_buckets_by_its_columns(tmp_path: Path, names: tuple[str, str]) -> None:
    """Also where a row has no size, and of the rows that source.where takes only."""
    pq.write_table(table(names), tmp_path / "urls.parquet")
    source = ("source.kind=urls", f"source.path={tmp_path / 'urls.parquet'}", "images.sizes_px=[32,64]")
    crops = plan(tmp_path / "run", *source, "images.aspect=buckets")["outlook"]["crops"]
    assert crops["histogram"] == {"24x40": 1, "32x32": 1, "40x24": 2}
    assert crops["images"] == 4
    assert crops["square"] == pytest.approx((0.25 + 0 + 0.25 + 2 / 3) / 4)
    assert crops["text"].endswith("40x24 50.0% (the columns of width and height of 4 rows)")
    where = f"source.where={names[0]} >= 600"
    assert plan(tmp_path / "run", *source, where)["outlook"]["crops"]["images"] == 2
    squares = plan(tmp_path / "run", *source)["outlook"]["crops"]
    assert squares["text"].startswith(
        "squares cut off 29.2% of an image on average; images.aspect=buckets would cut off"
    )


def test_a_plan_says_which_part_of_a_list_passes_the_filters_by_size(tmp_path: Path) -> None:
    pq.write_table(table(("width", "height")), tmp_path / "urls.parquet")
    source = ("source.kind=urls", f"source.path={tmp_path / 'urls.parquet'}", "images.sizes_px=[32,300]")
    filters = "filters=[{kind: max_pixels, max: 300000}, {kind: max_side, max: 700}]"
    sizes = plan(tmp_path / "run", *source, filters)["outlook"]["sizes"]
    assert sizes["kept"] == 0.25
    assert sizes["rejected"] == {"too_many_pixels": 0.5, "side_too_long": 0.25}
    assert sizes["text"].startswith("25.0% of the images pass the filters by size, too_many_pixels 50.0%, side_too_l")
    assert sizes["text"].endswith("(the columns of width and height of 4 rows)")


def test_a_plan_of_a_text_list_counts_its_columns_too(tmp_path: Path) -> None:
    lines = [
        "url,caption,width,height",
        *(f"{url},words,640,{height}" for url, height in zip(URLS, "12x4", strict=False)),
    ]
    (tmp_path / "urls.csv").write_text("\n".join(lines))
    found, _ = _sizes(f"source.path={tmp_path / 'urls.csv'}")
    assert found == [(640, 1), (640, 2), (640, 4)]


def _sizes(*overrides: str) -> tuple[list[tuple[int, int]], str]:
    config = load_config(PrecomputeConfig, None, ["source.kind=urls", *overrides])
    return original_sizes(config.source.build(), [])


def test_a_list_without_sizes_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("\n".join(URLS))
    assert _sizes(f"source.path={tmp_path / 'urls.txt'}") == ([], "")
    run = plan(
        tmp_path / "run", "source.kind=urls", f"source.path={tmp_path / 'urls.txt'}", "source.caption_column=null"
    )
    assert run["outlook"] == {}


def test_a_plan_of_images_on_this_machine_measures_some(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (width, height) in enumerate([(50, 30), (30, 50), (50, 30)]):
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no image")
    crops = plan(
        tmp_path / "run",
        "source.kind=folder",
        f"source.path={folder}",
        "images.aspect=buckets",
        "images.sizes_px=[32]",
    )["outlook"]["crops"]
    assert crops["histogram"] == {"24x40": 1, "40x24": 2}
    assert crops["basis"] == "3 images of the input"
    assert crops["buckets"] == 0
