"""What is drawn of curves, and where."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stages.browse.line_chart import Series, line_chart, smooth, thin
from stages.browse.web import templates


@given(arrays(float, st.integers(1, 400), elements=st.floats(-1e6, 1e6)), st.integers(1, 20))
def test_thinning_keeps_the_extremes_of_each_part_in_their_order(y: np.ndarray, buckets: int) -> None:
    x = np.arange(len(y), dtype=float)
    thin_x, thin_y = thin(x, y, buckets)
    assert len(thin_x) <= max(2 * buckets, 1) or len(y) <= 2 * buckets
    assert (np.diff(thin_x) > 0).all()
    assert (y[thin_x.astype(int)] == thin_y).all()
    assert (thin_y.min(), thin_y.max()) == (y.min(), y.max())


def test_a_single_outlier_of_a_million_steps_is_drawn() -> None:
    y = np.zeros(1_000_000)
    y[777_777] = 5.0
    x, thinned = thin(np.arange(1_000_000.0), y, 600)
    assert len(x) <= 1200
    assert x[thinned == 5.0].tolist() == [777_777.0]


def test_steps_far_apart_are_parts_of_their_own() -> None:
    x = np.concatenate([np.arange(10.0), [1000.0]])
    thinned, _ = thin(x, np.arange(11.0), 4)
    assert thinned.tolist() == [0.0, 9.0, 1000.0]


@pytest.mark.parametrize("weight", [0.5, 0.9, 0.99])
def test_a_smoothed_value_is_the_weighted_mean_of_all_up_to_it(weight: float) -> None:
    y = np.random.default_rng(0).normal(size=300)
    weights = [weight ** np.arange(n, -1, -1.0) for n in range(300)]
    expected = [float((w * y[: len(w)]).sum() / w.sum()) for w in weights]
    np.testing.assert_allclose(smooth(y, weight), expected, rtol=1e-12)


def test_smoothing_leaves_a_constant_and_skips_what_is_not_finite() -> None:
    y = np.array([2.0, np.nan, 2.0, np.inf, 2.0])
    np.testing.assert_allclose(smooth(y, 0.9), y)
    np.testing.assert_allclose(smooth(np.full(100, 3.0), 0.99), 3.0)


def test_points_lie_where_the_axes_say() -> None:
    chart = line_chart("loss", [Series("a", np.array([0.0, 5.0, 10.0]), np.array([0.0, 1.0, 2.0]))])
    assert chart is not None
    (line,) = chart.lines
    places = [tuple(map(float, place.split(","))) for place in line.path.removeprefix("M").split(" ")]
    ys = {tick.text: tick.at for tick in chart.y_ticks}
    assert [x for x, _ in places] == [chart.left, (chart.left + chart.right) / 2, chart.right]
    assert [y for _, y in places] == pytest.approx([ys["0"], ys["1"], ys["2"]], abs=0.06)
    assert chart.top < ys["2"] < ys["0"] < chart.bottom
    assert line.last == "2"


def test_on_a_logarithmic_axis_equal_factors_are_equal_distances() -> None:
    chart = line_chart("lr", [Series("lr", np.arange(3.0), np.array([1e-4, 1e-3, 1e-2]))], log=True)
    assert chart is not None
    places = [tick.at for tick in chart.y_ticks]
    assert [tick.text for tick in chart.y_ticks] == ["1e-4", "0.001", "0.01"]
    assert places[0] - places[1] == pytest.approx(places[1] - places[2], abs=0.02)


def test_values_that_a_logarithmic_axis_cannot_show_are_counted() -> None:
    series = Series("a", np.arange(4.0), np.array([-1.0, 0.0, 1.0, 10.0]))
    chart = line_chart("a", [series], log=True)
    assert chart is not None
    assert chart.note == "2 values of 0 and less are not drawn"
    assert line_chart("a", [Series("a", np.arange(2.0), np.array([0.0, -1.0]))], log=True) is None


def test_a_value_that_is_not_finite_breaks_the_line() -> None:
    chart = line_chart("a", [Series("a", np.arange(5.0), np.array([1.0, 2.0, np.nan, 2.0, 1.0]))])
    assert chart is not None
    assert chart.lines[0].path.count("M") == 2


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("value", [1e-12, 0.02, 1.0, 1e30])
def test_a_constant_has_a_line_with_ticks_around_it(value: float, log: bool) -> None:
    jitter = value * (1 + 1e-15 * np.arange(10))
    chart = line_chart("lr", [Series("lr", np.arange(10.0), jitter)], log=log, smoothing=0.9)
    assert chart is not None
    assert "nan" not in chart.lines[0].path
    assert all(chart.top <= tick.at <= chart.bottom for tick in chart.y_ticks)


def test_smoothed_curves_are_drawn_over_the_faint_ones() -> None:
    chart = line_chart(
        "a", [Series("a", np.arange(9.0), np.arange(9.0)), Series("b", np.arange(9.0), np.ones(9))], smoothing=0.6
    )
    assert chart is not None
    assert [(line.name, line.faint, line.colour) for line in chart.lines] == [
        ("a", True, 0),
        ("b", True, 1),
        ("a", False, 0),
        ("b", False, 1),
    ]


def test_names_in_a_chart_are_text() -> None:
    series = Series("<script>alert(1)</script>", np.arange(2.0), np.arange(2.0), labels=("<b>", "&"))
    chart = line_chart("<img src=x>", [series], x_label="<i>")
    page = (
        templates()
        .from_string('{% from "line_chart.html" import line_chart %}{{ line_chart(chart) }}')
        .render(chart=chart)
    )
    assert not [tag for tag in ("<script", "<img", "<b>", "<i>") if tag in page]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_table_has_the_values_themselves_and_leaves_out_what_is_far_away() -> None:
    steps = np.arange(0.0, 1101.0)
    sparse = Series("b", np.array([500.0]), np.array([0.125]))
    chart = line_chart("loss", [Series("a", steps, steps * 0.01), sparse], x_label="step")
    assert chart is not None
    titles, rows = chart.table(12)
    assert titles == ["step", "a", "b"]
    assert [row[0] for row in rows] == ["0", *(str(100 * n) for n in range(1, 10)), "1,000", "1,100"]
    assert [row[1] for row in rows] == ["0", *map(str, range(1, 12))]
    assert [row[2] for row in rows] == ["0.125" if row[0] == "500" else "" for row in rows]


def test_a_chart_holds_what_it_draws_as_numbers_and_the_ends_of_its_axes() -> None:
    given = Series("a", np.array([10.0, 20.0, 30.0]), np.array([1.0, np.nan, 100.0]))
    chart = line_chart("loss", [given], log=True)
    assert chart is not None
    assert chart.lines[0].values == "[[10,30],[1.0,100.0],[]]"
    x, y, _ = json.loads(chart.lines[0].values)
    (left, right), (bottom, top) = chart.x_ends, chart.y_ends
    places = [place.split(",") for place in chart.lines[0].path.split("M")[1:] for place in place.split(" ")[:1]]
    for value_x, value_y, (at_x, at_y) in zip(x, y, places, strict=True):
        across = chart.left + (value_x - left) / (right - left) * (chart.right - chart.left)
        up = chart.bottom + (np.log10(value_y) - bottom) / (top - bottom) * (chart.top - chart.bottom)
        assert (across, up) == pytest.approx((float(at_x), float(at_y)), abs=0.06)


def test_labels_stay_with_their_points() -> None:
    given = Series("KD", np.array([3.0, 1.0, 2.0]), np.array([0.3, np.inf, 0.2]), labels=("c", "a", "b"))
    chart = line_chart("KD", [given], x_label="guidance")
    assert chart is not None
    assert chart.table()[1] == [["3", "0.3 (c)"], ["2", "0.2 (b)"]]
