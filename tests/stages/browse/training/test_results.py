"""The results of evaluations."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.storage import LocalStorage
from stages.browse.training.results import read_results
from stages.evaluation.report import write_report

ROWS: list[dict[str, Any]] = [
    {
        "name": f"guidance-{weight:g}",
        "guidance": weight,
        "images": 3000,
        "frechet_distance": distance,
        "clip_score": score,
    }
    for weight, distance, score in ((1.0, 20.0, 15.0), (2.5, 10.0, 17.0), (8.0, 14.0, 19.0))
]


def written(root: Path, rows: list[dict[str, Any]]) -> LocalStorage:
    write_report(root, {"features_model": "inception", "clip_model": "ViT-L/14", "rows": rows})
    return LocalStorage(root)


def test_a_guidance_sweep_is_a_table_and_a_plot_of_distance_against_score(tmp_path: Path) -> None:
    found = read_results(written(tmp_path, ROWS))
    assert found is not None
    assert found.table[0] == ["images of", "number", "FD (inception)", "CLIP score"]
    assert found.table[2] == ["guidance-2.5", "3,000", "10.0000", "17.000"]
    assert found.notes == ["CLIP score: 100 cos, by ViT-L/14"]
    first = found.charts[0]
    assert (first.title, first.x_label) == ("FD (inception)", "CLIP score")
    points = first.lines[0].points
    assert [point.text for point in points] == ["1", "2.5", "8"]
    assert points[0].x < points[1].x < points[2].x  # rising score
    assert points[1].y > points[2].y > points[0].y  # the least distance lies lowest
    assert [(each.title, each.x_label) for each in found.charts[1:]] == [
        ("FD (inception)", "guidance weight"),
        ("CLIP score", "guidance weight"),
    ]


def test_one_row_has_no_plot(tmp_path: Path) -> None:
    found = read_results(written(tmp_path, [{"name": "generated", "images": 3, "clip_score": 20.0, "warning": "few"}]))
    assert found is not None
    assert (found.charts, found.notes[0]) == ([], "generated: few")


def test_a_likelihood_has_its_numbers_and_curves_per_step(tmp_path: Path) -> None:
    summary = {"images": 8, "bits_per_dimension": 3.5, "bound_bits": [0.5, 0.25, 0.125], "device": "cpu"}
    (tmp_path / "summary.json").write_text(json.dumps({"summary": summary}))
    found = read_results(LocalStorage(tmp_path))
    assert found is not None
    assert found.numbers == {"images": 8, "bits_per_dimension": 3.5}
    assert [(each.title, each.lines[0].last) for each in found.charts] == [("bound bits", "0.125")]


def test_a_folder_without_results_yet_has_none(tmp_path: Path) -> None:
    assert read_results(LocalStorage(tmp_path)) is None


@pytest.mark.parametrize("results", ["[]", '{"rows": 3}', '{"rows": [3]}', '{"rows": [{"name": 1}]}', "{"])
def test_damaged_results_are_one_line_that_names_the_file(tmp_path: Path, results: str) -> None:
    (tmp_path / "results.json").write_text(results)
    with pytest.raises(ConfigError, match=r"results\.json") as caught:
        read_results(LocalStorage(tmp_path))
    assert "\n" not in str(caught.value)
