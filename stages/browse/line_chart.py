"""Curves as inline SVG: what is thinned and where it lies is computed here, drawn by `templates/line_chart.html`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

_WIDTH, _HEIGHT = 400.0, 200.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 8.0, 8.0, 20.0
_BUCKETS = 600
"""Parts of the horizontal axis, each drawn by its least and greatest value: more than a chart has pixels."""
_COLOURS = 8
_FAINT_FROM = 0.01
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Series:
    """A curve: float (n,) `x`, rising, and `y`; what is not finite is not drawn, and breaks the line.

    Attributes:
        labels: texts at the points, one for each; then the points are drawn too.
        colour: of the line, from 0; those of one colour belong together.
        faint: drawn lightly and without a name, behind the others.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    labels: tuple[str, ...] = ()
    colour: int | None = None
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """A point that is marked."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A curve in units of the view box: the `d` of an SVG path, the class of its colour, its last value.

    Attributes:
        x, y: the values that are drawn.
        labels: a text for each of them, or none.
    """

    name: str
    path: str
    colour: int
    faint: bool
    points: tuple[Point, ...]
    last: str
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def values(self) -> str:
        """What is drawn as JSON: x, y and labels; y to six digits."""
        x = (int(each) if each.is_integer() else each for each in self.x)
        return json.dumps([[*x], [float(f"{each:.6g}") for each in self.y], self.labels], separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class AxisTick:
    """A value on an axis, and where it is."""

    text: str
    at: float


@dataclass(frozen=True, slots=True)
class LineChart:
    """Curves over one axis; `left`, `right`, `top` and `bottom` are the edges of their area in the view box.

    Attributes:
        note: says what is not shown; empty where everything is.
        x_ends: the values at `left` and `right`.
        y_ends: the values at `bottom` and `top`, of a logarithmic axis their decimal logarithms.
        log: whether the vertical axis is logarithmic.
    """

    title: str
    x_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[AxisTick, ...]
    y_ticks: tuple[AxisTick, ...]
    note: str = ""
    x_ends: tuple[float, float] = (0.0, 1.0)
    y_ends: tuple[float, float] = (0.0, 1.0)
    log: bool = False
    width: float = _WIDTH
    height: float = _HEIGHT
    left: float = _LEFT
    right: float = _WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = _HEIGHT - _BOTTOM

    def table(self, most: int = 12) -> tuple[list[str], list[list[str]]]:
        """The chart as a table: titles, and rows at values of x spread evenly over those of the longest curve. A curve
        without a value near there has an empty cell."""
        lines = [line for line in self.lines if not line.faint]
        longest = max(lines, key=lambda line: len(line.x))
        places = np.unique(np.linspace(0, len(longest.x) - 1, most).round().astype(int)).tolist()
        x = [longest.x[place] for place in places]
        near = 0.5 * (max(x) - min(x)) / max(1, len(x) - 1)
        columns = [_near(line, np.array(x), near) for line in lines]
        rows = [[_text(each, exact=True), *cells] for each, *cells in zip(x, *columns, strict=True)]
        return [self.x_label or "x", *(line.name for line in lines)], rows


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str = "", log: bool = False, smoothing: float = 0.0
) -> LineChart | None:
    """The chart of some curves; None where there is no value to draw.

    Args:
        log: the vertical axis is logarithmic; values of 0 and less are not drawn, and counted in the note.
        smoothing: from 0 (none) to less than 1, see `smooth`; the curves themselves are then drawn faintly behind.
    """
    drawn, hidden = [], 0
    for number, each in enumerate(series):
        each = replace(each, colour=(number if each.colour is None else each.colour) % _COLOURS)
        keep = np.isfinite(each.x) & ~((each.y <= 0) if log else np.zeros(len(each.y), bool))
        hidden += len(each.y) - int(keep.sum())
        each = each if keep.all() else replace(each, x=each.x[keep], y=each.y[keep], labels=_kept(each.labels, keep))
        if not np.isfinite(each.y).any():
            continue
        if smoothing >= _FAINT_FROM and not each.labels and len(each.y) > 1:
            drawn += [replace(each, faint=True), replace(each, y=smooth(each.y, smoothing))]
        else:
            drawn.append(each)
    if not drawn:
        return None
    xs, ys = (_range([getattr(each, axis) for each in drawn]) for axis in ("x", "y"))
    y_scale = _Scale(*_padded(ys, log=log), _HEIGHT - _BOTTOM, _TOP, log=log)
    x_scale = _Scale(
        *_padded(xs, share=0.0 if not any(each.labels for each in drawn) else 0.06), _LEFT, _WIDTH - _RIGHT
    )
    note = f"{hidden:,} values of 0 and less are not drawn" if hidden and log else ""
    lines = [_line(each, x_scale, y_scale) for each in sorted(drawn, key=lambda each: not each.faint)]
    ends = (math.log10(y_scale.low), math.log10(y_scale.high)) if log else (y_scale.low, y_scale.high)
    return LineChart(
        title,
        x_label,
        tuple(lines),
        x_scale.ticks(5),
        y_scale.ticks(4),
        note,
        (x_scale.low, x_scale.high),
        ends,
        log,
    )


def thin(x: np.ndarray, y: np.ndarray, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """At most two points for each of `buckets` equal parts of the range of x: the least and the greatest y in it.

    Args:
        x: (n,) rising.
        y: (n,) finite.
    Returns:
        (m,) x and y, m <= 2 * buckets, in their order; the same arrays where there are no more.
    """
    if len(x) <= 2 * buckets:
        return x, y
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], buckets + 1)[1:-1], side="left")
    starts = np.unique(np.concatenate([[0], edges]))
    starts = starts[starts < len(x)]
    kept: list[int] = []
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(x)], strict=True):
        part = y[start:end]
        kept += sorted({start + int(part.argmin()), start + int(part.argmax())})
    return x[kept], y[kept]


def smooth(y: np.ndarray, weight: float) -> np.ndarray:
    """Exponential moving mean of (n,) values, without bias at the start: the weight of a value falls by `weight` with
    each later one, and weights sum to 1. Values that are not finite stay so, and count for nothing."""
    found = np.isfinite(y)
    means = y.astype(float)
    total = _decaying_sums(means[found], weight)
    means[found] = total * (1 - weight) / (1 - weight ** np.arange(1, len(total) + 1))
    return means


def _decaying_sums(values: np.ndarray, weight: float) -> np.ndarray:
    """sum_i weight**(t - i) values_i over i <= t, for each t of (n,) values: within blocks as a product with a matrix,
    then what each block takes over from the one before it."""
    count = len(values)
    blocks = np.pad(values, (0, -count % _BLOCK)).reshape(-1, _BLOCK)
    age = np.arange(_BLOCK)[:, None] - np.arange(_BLOCK)
    within = blocks @ np.where(age >= 0, weight ** np.maximum(age, 0), 0.0).T
    taken_over, powers = 0.0, weight ** np.arange(1, _BLOCK + 1)
    for block in within:
        block += taken_over * powers
        taken_over = float(block[-1])
    return within.reshape(-1)[:count]


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps values of an axis to the view box."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, values: np.ndarray) -> np.ndarray:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        values = np.log10(values) if self.log else values
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int) -> tuple[AxisTick, ...]:
        values = _log_ticks(self.low, self.high, most) if self.log else _ticks(self.low, self.high, most)
        return tuple(AxisTick(_text(value), round(float(self.at(np.array(value))), 2)) for value in values)


def _line(series: Series, x_scale: _Scale, y_scale: _Scale) -> Line:
    finite = np.isfinite(series.y)
    colour, labels = series.colour or 0, series.labels
    last = _text(float(series.y[finite][-1])) if finite.any() else "-"
    pieces, points = [], []
    drawn: tuple[list[float], list[float]] = [], []
    for start, end in _runs(finite):
        x, y = series.x[start:end], series.y[start:end]
        if not labels:
            x, y = thin(x, y, _BUCKETS)
        drawn[0].extend(x.tolist())
        drawn[1].extend(y.tolist())
        places = list(zip(x_scale.at(x).tolist(), y_scale.at(y).tolist(), strict=True))
        pieces.append("M" + " ".join(f"{a:.1f},{b:.1f}" for a, b in (places if len(places) > 1 else places * 2)))
        points += [
            Point(round(a, 1), round(b, 1), labels[start + i]) for i, (a, b) in enumerate(places if labels else ())
        ]
    shown = tuple(label for label, is_drawn in zip(labels, finite, strict=False) if is_drawn)
    return Line(
        series.name,
        "".join(pieces),
        colour,
        series.faint,
        tuple(points),
        last,
        tuple(drawn[0]),
        tuple(drawn[1]),
        shown,
    )


def _near(line: Line, x: np.ndarray, most: float) -> list[str]:
    """The values of a curve nearest to each x, with their labels; "" where one is farther away than `most`."""
    distances = np.abs(np.array(line.x)[:, None] - x)
    labels = [f" ({label})" for label in line.labels] or [""] * len(line.y)
    places = zip(distances.argmin(axis=0).tolist(), distances.min(axis=0).tolist(), strict=True)
    return [_text(line.y[at]) + labels[at] if distance <= most else "" for at, distance in places]


def _runs(finite: np.ndarray) -> list[tuple[int, int]]:
    """Starts and ends of the stretches of true values."""
    changes = np.flatnonzero(np.diff(np.concatenate([[0], finite.astype(np.int8), [0]])))
    return list(zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True))


def _kept(labels: tuple[str, ...], keep: np.ndarray) -> tuple[str, ...]:
    return tuple(label for label, kept in zip(labels, keep, strict=True) if kept) if labels else ()


def _range(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    finite = [values[np.isfinite(values)] for values in arrays]
    finite = [values for values in finite if len(values)]
    return min(float(values.min()) for values in finite), max(float(values.max()) for values in finite)


def _padded(ends: tuple[float, float], *, log: bool = False, share: float = 0.04) -> tuple[float, float]:
    """A range a little wider, and never empty."""
    low, high = ends
    constant = high - low <= 1e-9 * max(abs(low), abs(high))  # but for rounding
    if log:
        factor = 2.0 if constant else (high / low) ** max(share, 0.01)
        return low / factor, high * factor
    pad = (abs(low) * 0.1 or 0.5) if constant else (high - low) * share
    return low - pad, high + pad


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values in a range: multiples of 1, 2 or 5 times a power of ten; at most `most` + 1."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten in a range; round values as on a linear axis where there are fewer than two."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = [10.0**power for power in range(first, last + 1)]
    if len(powers) >= 2:
        return powers[:: -(-len(powers) // most)]
    return [value for value in _ticks(low, high, most) if value > 0]


def _text(value: float, *, exact: bool = False) -> str:
    """A value in few characters: 0.25, 12,000, 1.5M, 2e-5; where `exact`, a whole number in all of its digits."""
    if value == 0:
        return "0"
    if exact and value == int(value):
        return f"{int(value):,}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if factor <= abs(value) < 1e15:
                return f"{value / factor:.4g}{unit}"
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
