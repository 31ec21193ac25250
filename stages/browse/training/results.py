"""The results of an evaluation: a table, plots of guidance sweeps, and numbers of a likelihood."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.storage import Storage
from pipeline.storage.run_folder import SUMMARY
from stages.browse.line_chart import LineChart, Series, line_chart
from stages.evaluation.report import RESULTS, distance_name, notes_of, table_of

_SETTINGS = {
    "sigma_rel": "length of the average, sigma_rel",
    "guidance": "guidance weight",
    "autoguidance": "autoguidance weight",
}
"""What an evaluation compares, with the name of its axis."""
_SWEPT = (
    ("clip_score", "CLIP score"),
    ("kernel_distance", "KD"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("inception_score", "IS"),
    ("lpips", "LPIPS"),
)
_REMEDY = "evaluate again"


@dataclass(frozen=True, slots=True)
class Results:
    """What an evaluation found, as text and charts.

    Attributes:
        table: a line of titles, then one per row.
        numbers: further single numbers, by name.
    """

    table: list[list[str]]
    notes: list[str]
    charts: list[LineChart]
    numbers: dict[str, float]


def read_results(storage: Storage) -> Results | None:
    """The results in a folder; None where there are none yet.

    Raises:
        ConfigError: they are damaged.
    """
    results = storage.read_json(RESULTS, _REMEDY)
    if results is not None:
        if not isinstance(results, dict) or not isinstance(results.get("rows"), list):
            raise ConfigError(f"{storage.url}/{RESULTS}: has no rows; {_REMEDY}")
        results = {"features_model": None, "clip_model": None, **results}
        try:
            return Results(table_of(results), notes_of(results), _sweeps(results), {})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{storage.url}/{RESULTS}: a row is damaged ({error!r}); {_REMEDY}") from error
    summary = storage.read_json_if_whole(SUMMARY)
    found = summary.get("summary") if isinstance(summary, dict) else None
    return _of_summary(found) if isinstance(found, dict) else None


def _sweeps(results: Mapping[str, Any]) -> list[LineChart]:
    """The distance against the CLIP score, then each metric against what is swept, if it is one setting; those with
    two points."""
    rows, distance = results["rows"], distance_name(results["features_model"])
    charts = [_points(distance, rows, "clip_score", "frechet_distance", "CLIP score")]
    swept = [name for name in _SETTINGS if any(_is_number(row.get(name)) for row in rows)]
    for key, title in (("frechet_distance", distance), *_SWEPT) if len(swept) == 1 else ():
        charts.append(_points(title, rows, swept[0], key, _SETTINGS[swept[0]]))
    return [chart for chart in charts if chart is not None]


def _points(title: str, rows: Sequence[Mapping[str, Any]], x: str, y: str, x_label: str) -> LineChart | None:
    found = [row for row in rows if _is_number(row.get(x)) and _is_number(row.get(y))]
    if len(found) < 2:
        return None
    values = [[f"{row[name]:g}" for name in _SETTINGS if _is_number(row.get(name))] for row in found]
    labels = tuple(", ".join(each) or str(row["name"]) for each, row in zip(values, found, strict=True))
    xs, ys = (np.array([row[key] for row in found], float) for key in (x, y))
    return line_chart(title, [Series(title, xs, ys, labels)], x_label=x_label)


def _of_summary(summary: Mapping[str, Any]) -> Results:
    """The numbers of a likelihood; its lists are per step of the noise levels, from the most noise to the least."""
    numbers = {name: value for name, value in summary.items() if _is_number(value)}
    lists = {name: value for name, value in summary.items() if isinstance(value, list) and len(value) > 1}
    curves = {name: np.array(value, float) for name, value in lists.items() if all(map(_is_number, value))}
    charts = [
        line_chart(name.replace("_", " "), [Series(name, np.arange(len(values), dtype=float), values)], x_label="step")
        for name, values in curves.items()
    ]
    return Results([], [], [chart for chart in charts if chart is not None], numbers)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
