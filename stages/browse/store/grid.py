"""What the grid's page shows: samples that fit, and charts whose bars choose some of them."""

import math
from dataclasses import dataclass

from stages.browse.charts import BarChart, Bin, bar_chart
from stages.browse.store.fields import Field
from stages.browse.store.query import Query
from stages.browse.store.table import Answers, Row, SamplesTable

PAGE_ROWS = 60
_MOST_BINS, _MOST_CHOICES = 40, 20


@dataclass(frozen=True, slots=True)
class Page:
    """Samples `first` to `first + len(rows) - 1` of `count`, from 0."""

    rows: list[Row]
    first: int
    count: int
    number: int

    @property
    def last_number(self) -> int:
        """Of the last page; pages count from 1."""
        return max(1, -(-self.count // PAGE_ROWS))


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many samples have which values of a field; `clear` is the address without the condition on it, if there is
    one."""

    field: Field
    chart: BarChart
    clear: str | None


def page_of(answers: Answers, number: int) -> Page:
    """A page of the grid; one beyond the last is the last."""
    count = answers.count()
    number = min(max(number, 1), max(1, -(-count // PAGE_ROWS)))
    first = (number - 1) * PAGE_ROWS
    return Page(answers.rows(first, PAGE_ROWS), first, count, number)


def histogram_of(answers: Answers, table: SamplesTable, field: Field, query: Query) -> Histogram | None:
    """The chart of a field over the samples that fit all other conditions; None if no sample has a value.

    A bar of a range of numbers stands for its values, the outer two also for what lies beyond.
    """
    others = query.without(field.key)
    clear = (others.address() or "?") if others != query else None
    if field.kind == "choice":
        chart = _choices(answers, field, query, others)
    else:
        span = table.span(field)
        chart = _numbers(answers, field, span, query, others) if span else None
    return Histogram(field, chart, clear) if chart else None


def _choices(answers: Answers, field: Field, query: Query, others: Query) -> BarChart | None:
    found = answers.choices(field, _MOST_CHOICES)
    if not found:
        return None
    chosen = query.choices.get(field.key)
    bins = [Bin(v, n, others.with_choice(field.key, v).address(), v == chosen) for v, n in found]
    ticks = [_short(found[0][0]), _short(found[-1][0])] if len(found) > 1 else [_short(found[0][0])]
    return bar_chart(field.title, bins, ticks)


def _numbers(answers: Answers, field: Field, span: tuple[float, float], query: Query, others: Query) -> BarChart:
    low, high = span
    if field.kind == "int":
        step = float(max(1, math.ceil((high - low + 1) / _MOST_BINS)))
        number = int((high - low) // step) + 1
    else:
        number = _MOST_BINS if high > low else 1
        step = (high - low) / number or 1.0
    counts = answers.bins(field, low, step, number)
    chosen = query.ranges.get(field.key)
    bins = []
    for i, count in enumerate(counts):
        start = low + i * step
        end = start + step - 1 if field.kind == "int" else start + step
        bounds = (None if i == 0 else start, None if i == number - 1 else end)
        label = _text(start) if start == end else f"{_text(start)} to {_text(end)}"
        label = (
            f"up to {_text(end)}" if i == 0 < number - 1 else f"{_text(start)} and more" if i == number - 1 else label
        )
        href = others.with_range(field.key, *bounds).address() if bounds != (None, None) else others.address() or "?"
        bins.append(Bin(label, count, href, chosen is not None and chosen == bounds))
    return bar_chart(field.title, bins, [_text(low), _text(high)] if high > low else [_text(low)])


def _text(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:.4g}"


def _short(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:19]}…"
