"""Which charts a training has, or several laid over each other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from stages.browse.line_chart import LineChart, Series, line_chart
from stages.browse.training.metrics import Metrics

SMOOTHINGS = (0.0, 0.6, 0.9, 0.99)

_TITLES = {
    "loss": "Training loss",
    "validation_loss": "Validation loss",
    "lr": "Learning rate",
    "alignment": "Alignment: mean cosine to the encoder's features",
    "grad_norm": "Gradient norm",
    "images_per_s": "Images per second",
    "loader_wait": "Waiting for the loader, fraction of the time",
}
"""The charts that come first, by the metric they show."""
_FURTHER = {
    "validation_loss_without_ema": "Validation loss without averaged weights",
    "step_s": "Seconds per step",
    "epoch": "Epoch",
    "samples": "Samples seen",
    "peak_memory_bytes": "Peak memory, bytes",
    "loss_scale": "Loss scale",
}


@dataclass(frozen=True, slots=True)
class View:
    """How curves are shown.

    Attributes:
        smoothing: one of `SMOOTHINGS`.
        log: whether vertical axes are logarithmic.
        first, last: the steps that are shown; None: from the beginning, to the newest.
    """

    smoothing: float = 0.0
    log: bool = False
    first: int | None = None
    last: int | None = None

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "View":
        """The view that an address asks for; what is no valid value is as if it were not there."""
        smoothing = next((each for each in SMOOTHINGS if f"{each:g}" == query.get("smoothing")), 0.0)
        return cls(smoothing, query.get("log") == "1", _step(query.get("first")), _step(query.get("last")))

    def query(self) -> dict[str, str]:
        """The part of an address that asks for this view."""
        values = {"smoothing": self.smoothing, "log": int(self.log), "first": self.first, "last": self.last}
        return {name: f"{value:g}" if name == "smoothing" else str(value) for name, value in values.items() if value}


@dataclass(frozen=True, slots=True)
class Curves:
    """The charts that everyone looks at, and the others."""

    main: tuple[LineChart, ...]
    further: tuple[LineChart, ...]


@lru_cache(maxsize=4)
def curves_of(trainings: tuple[tuple[str, Metrics], ...], view: View) -> Curves:
    """The charts of some trainings, one per metric that any of them has.

    Args:
        trainings: name and metrics of each; one name of each is on the charts if there are several.
    """
    groups = _groups({name for _, metrics in trainings for name in metrics.values})
    main, further = [], []
    for title, names in groups.items():
        series = tuple(_series(trainings, names, view))
        chart = line_chart(title, series, x_label="step", log=view.log, smoothing=view.smoothing)
        if chart is not None:
            (main if names[0] in _TITLES else further).append(chart)
    return Curves(tuple(main), tuple(further))


def _groups(names: set[str]) -> dict[str, list[str]]:
    """The metrics of each chart, by its title; those of the stores of a mixture (`validation_loss/NAME`) share one."""
    titles = {**_TITLES, **_FURTHER}
    found: dict[str, list[str]] = {}
    order = [*titles, *sorted({name.partition("/")[0] for name in names} - titles.keys())]
    for kind in order:
        of_kind = sorted(name for name in names if name.partition("/")[0] == kind)
        if of_kind:
            found[titles.get(kind, kind.replace("_", " "))] = of_kind
    return found


def _series(trainings: Sequence[tuple[str, Metrics]], names: Sequence[str], view: View) -> Iterator[Series]:
    several = len(trainings) > 1
    number = 0
    for training, metrics in trainings:
        for name in names:
            x, y = metrics.curve(name, view.first, view.last)
            part = name.partition("/")[2]
            own = part or name
            label = (f"{training}: {part}" if part else training) if several else own
            yield Series(label, x, y, colour=number)
            number += 1


def _step(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 16 else None
