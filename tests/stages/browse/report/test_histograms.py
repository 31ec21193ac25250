import json
from pathlib import Path

import numpy as np
import pytest

from imagen_core import store as st
from stages.browse.report import histograms
from stages.browse.report.histograms import aspect_chart, count_chart, image_shapes, shape_charts
from tests.imagen_core.train.small import make_store


def counts(chart: histograms.BarChart) -> dict[str, int]:
    return {bar.label: bar.count for bar in chart.bars if bar.count}


def ticks(chart: histograms.BarChart) -> list[str]:
    return [tick.text for tick in chart.ticks]


def test_few_numbers_have_a_bar_each() -> None:
    chart = count_chart("tokens", [3, 5, 5, 7, 7, 7])
    assert [(bar.label, bar.count) for bar in chart.bars] == [("3", 1), ("4", 0), ("5", 2), ("6", 0), ("7", 3)]
    assert ticks(chart) == ["3", "5", "7"]
    assert chart.bars[4].height == pytest.approx(3 * chart.bars[0].height, abs=0.02), "as high as their counts"


def test_many_numbers_share_forty_bars_and_each_is_counted_once() -> None:
    values = np.random.default_rng(0).integers(0, 10_000, 5000)
    chart = count_chart("width", values)
    assert len(chart.bars) == 40
    assert sum(bar.count for bar in chart.bars) == 5000
    assert chart.bars[0].label == f"{values.min():,} to {values.min() + 249:,}"
    assert chart.bars[0].count == np.count_nonzero(values < values.min() + 250)


def test_a_few_numbers_far_beyond_the_others_are_in_the_last_bar() -> None:
    chart = count_chart("tokens", [*range(1, 41), *[20] * 960, 100_000])
    assert [bar.label for bar in chart.bars[:2]] == ["1", "2"], "the others keep their bars"
    assert chart.bars[-1].label.endswith("to 100,000")
    assert sum(bar.count for bar in chart.bars) == 1001


def test_one_number_and_none_are_charts_too() -> None:
    assert counts(count_chart("width", [64, 64])) == {"64": 2}
    assert ticks(count_chart("width", [64, 64])) == ["64"]
    assert count_chart("width", []).bars == []
    assert shape_charts(np.empty((0, 2), np.int64)) == []


def test_aspects_of_turned_images_are_mirrored_and_the_outer_bars_have_the_rest() -> None:
    aspects = np.exp(np.random.default_rng(1).normal(size=500))
    upright, turned = ([bar.count for bar in aspect_chart(values).bars] for values in (aspects, 1 / aspects))
    assert upright == turned[::-1]
    assert counts(aspect_chart(np.array([0.01, 1.0, 100.0]))) == {
        "less than 0.27": 1,
        "1.00 to 1.09": 1,
        "3.67 and more": 1,
    }
    assert ticks(aspect_chart(aspects)) == ["1:4", "1:2", "1:1", "2:1", "4:1"]


def test_sizes_are_those_of_the_samples_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_store(tmp_path / "store", rows=(3, 2, 4), row_fields=lambda row: {"width": 10 + row, "height": 50})
    shapes = image_shapes(st.Store.open(root))
    assert shapes.tolist() == [[10 + row, 50] for rows in (3, 2, 4) for row in range(rows)]
    titles = [chart.title for chart in shape_charts(shapes)]
    assert titles == ["width / height", "width, px", "height, px"]
    exclude(root, shard=2, row=0)
    assert image_shapes(st.Store.open(root)).tolist()[-3:] == [[11, 50], [12, 50], [13, 50]]
    monkeypatch.setattr(histograms, "_MOST_SHARDS", 2)
    assert len(image_shapes(st.Store.open(root))) == 3 + 3, "of the first and the last shard"


def exclude(root: Path, shard: int, row: int) -> None:
    """Rewrites the manifest as if a later size could not be made of this row."""
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["shards"][shard]["excluded"] = [row]
    header = {"writer": "test", "groups": manifest["groups"]}
    st.write_manifest(root / "manifest.json", header, manifest["shards"])
