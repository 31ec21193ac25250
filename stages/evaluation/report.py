"""The results of an evaluation as JSON, a table and a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.storage.files import write_json, write_text
from stages.figures import svg

TABLE, RESULTS, PLOT = "results.md", "results.json", "distance-clip.svg"
_SWEPT = ("sigma_rel", "guidance", "autoguidance")
_COLUMNS = (
    ("kernel_distance", "KD", "{:.5f}", "kernel_distance_std"),
    ("precision", "precision", "{:.3f}", None),
    ("recall", "recall", "{:.3f}", None),
    ("clip_score", "CLIP score", "{:.3f}", "clip_score_error"),
    ("inception_score", "IS", "{:.3f}", "inception_score_std"),
    ("lpips", "LPIPS", "{:.4f}", "lpips_error"),
)


def write_report(root: Path, results: Mapping[str, Any]) -> list[str]:
    """Writes the report; returns the names of its files.

    Args:
        results: `features_model`, `clip_model` (labels) and `rows`, each with a `name` and metrics.
    """
    rows = results["rows"]
    write_json(root / RESULTS, results)
    write_text(root / TABLE, _table(results))
    points = [row for row in rows if "frechet_distance" in row and "clip_score" in row]
    if len(points) < 2:
        (root / PLOT).unlink(missing_ok=True)
        return [RESULTS, TABLE]
    _plot(root / PLOT, points, results["features_model"], results["clip_model"])
    return [RESULTS, TABLE, PLOT]


def distance_name(model: str | None) -> str:
    """Name of the Frechet distance of a model's features; only with the Inception network it is called FID."""
    return f"FD ({model or 'features of unknown origin'})"


def table_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The results as text: a line of titles, then one per row; only the metrics that a row has."""
    rows = results["rows"]
    columns = [("frechet_distance", distance_name(results["features_model"]), "{:.4f}", None), *_COLUMNS]
    columns = [column for column in columns if any(column[0] in row for row in rows)]
    return [
        ["images of", "number", *(title for _, title, _, _ in columns)],
        *([row["name"], f"{row['images']:,}", *(_cell(row, *column) for column in columns)] for row in rows),
    ]


def notes_of(results: Mapping[str, Any]) -> list[str]:
    """What a reader of the results must know."""
    rows, clip_model = results["rows"], results["clip_model"]
    notes = [f"{row['name']}: {row['warning']}" for row in rows if "warning" in row]
    truncated = {row["captions_truncated"] for row in rows if row.get("captions_truncated")}
    notes += [f"{count:,} captions are longer than the CLIP model takes, and were truncated" for count in truncated]
    return notes + ([f"CLIP score: 100 cos, by {clip_model}"] if clip_model else [])


def _table(results: Mapping[str, Any]) -> str:
    titles, *rows = table_of(results)
    table = "\n".join("| " + " | ".join(line) + " |" for line in (titles, ["---"] * len(titles), *rows))
    notes = [f"- {note}" for note in notes_of(results)]
    return f"{table}\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")


def _cell(row: Mapping[str, Any], key: str, title: str, form: str, error: str | None) -> str:
    del title
    if key not in row:
        return "-"
    return form.format(row[key]) + ("" if error is None or error not in row else " ± " + form.format(row[error]))


def _label(row: Mapping[str, Any], swept: Sequence[str]) -> str:
    return ", ".join(f"{row[name]:g}" for name in swept)


def _plot(path: Path, rows: Sequence[Mapping[str, Any]], features_model: str | None, clip_model: str | None) -> None:
    """The distance against the CLIP score, with a labelled point per row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    swept = [name for name in _SWEPT if name in rows[0]]
    scores, distances = ([row[key] for row in rows] for key in ("clip_score", "frechet_distance"))
    axes.plot(scores, distances, marker="o", color="#3b6ea5")
    for row, score, distance in zip(rows, scores, distances, strict=True):
        axes.annotate(_label(row, swept), (score, distance), xytext=(5, 5), textcoords="offset points")
    axes.set_xlabel("CLIP score" + (f" ({clip_model})" if clip_model else ""))
    axes.set_ylabel(distance_name(features_model))
    axes.set_title("guidance weights" if swept == ["guidance"] else ", ".join(swept), fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    write_text(path, svg(figure))
