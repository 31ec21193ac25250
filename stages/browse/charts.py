"""Charts as inline SVG: where things lie is computed here, and drawn by the macros of `templates/charts.html`."""

from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _LABELS = 320.0, 90.0, 16.0


@dataclass(frozen=True, slots=True)
class Bin:
    """What a bar stands for: its label, its count, and the page that shows what is in it."""

    label: str
    count: float
    href: str | None = None
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar, in units of the view box."""

    label: str
    count: float
    href: str | None
    chosen: bool
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Tick:
    """A label under the bars."""

    text: str
    x: float
    anchor: str


@dataclass(frozen=True, slots=True)
class BarChart:
    """Bars from left to right; `floor` is the y of their lower end."""

    title: str
    bars: list[Bar]
    ticks: list[Tick]
    width: float = _WIDTH
    height: float = _HEIGHT
    floor: float = _HEIGHT - _LABELS


def bar_chart(title: str, bins: Sequence[Bin], ticks: Sequence[str] = ()) -> BarChart:
    """Bars as high as their counts; one that is not empty is at least a pixel high.

    Args:
        ticks: labels spread evenly below the bars, the first at the left end and the last at the right one.
    """
    most, floor = max((each.count for each in bins), default=0), _HEIGHT - _LABELS
    step = _WIDTH / max(1, len(bins))
    bars = []
    for number, each in enumerate(bins):
        height = max(1.0, round(each.count / most * (floor - 2), 2)) if each.count else 0.0
        x, width = round(number * step, 2), round(max(1.0, step - 1), 2)
        bars.append(Bar(each.label, each.count, each.href, each.chosen, x, floor - height, width, height))
    last = max(1, len(ticks) - 1)
    anchors = ["start", *["middle"] * (len(ticks) - 2), "end"][: len(ticks)]
    shown = [Tick(text, round(i * _WIDTH / last, 2), anchors[i]) for i, text in enumerate(ticks)]
    return BarChart(title, bars, shown)
