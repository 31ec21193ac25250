import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import call
from tests.trained import BASE, train, write_cascade


def write_training(folder: Path, *, grids: bool = True) -> Path:
    """A folder as a training leaves it, with losses 1, 1/2, 1/3 ... and a metric whose name is HTML."""
    (folder / "grids").mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"workflow": "train", "stages": [], "transient_groups": []}))
    (folder / "config.yaml").write_text("optimizer:\n  lr: 0.001  # <b>bold</b>\n")
    lines = [{"step": step, "loss": 1 / step, "<i>odd</i>": 2.0} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
    for step in (4, 8) if grids else ():
        Image.fromarray(np.full((4, 6, 3), step, np.uint8)).save(folder / "grids" / f"step-{step:08d}.png")
    return folder


def page_of(out: Path) -> str:
    result = call("report", str(out))
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == f"report  {out}/report/index.html"
    return (out / "report" / "index.html").read_text(encoding="utf-8")


def test_a_training_has_its_curves_newest_values_last_grid_and_configuration(tmp_path: Path) -> None:
    out = write_training(tmp_path / "base")
    page = page_of(out)
    assert "newest step 8" in page
    (path,) = re.findall(r'<path class="curve colour-0" d="M([^"]*)"><title>loss</title>', page)
    points = [tuple(map(float, point.split(","))) for point in path.split()]
    assert len(points) == 8
    heights = np.array([y for _, y in points])
    expected = heights[0] + (heights[-1] - heights[0]) * (1 - 1 / np.arange(1, 9)) / (1 - 1 / 8)
    assert np.abs(heights - expected).max() <= 0.11, "in the units of the chart, which have one decimal"
    (grid,) = re.findall(r'src="data:image/png;base64,([^"]+)" alt="samples of step 8"', page)
    assert base64.b64decode(grid) == (out / "grids" / "step-00000008.png").read_bytes()
    assert "lr: 0.001  # &lt;b&gt;bold&lt;/b&gt;" in page


def test_names_of_metrics_are_text_and_no_address_leads_out(tmp_path: Path) -> None:
    page = page_of(write_training(tmp_path / "base"))
    assert "&lt;i&gt;odd&lt;/i&gt;" in page
    assert "<i>" not in page
    assert "<script" not in page
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert ".curve" in page, "the style of curves is in the page"


def test_json_has_the_newest_values(tmp_path: Path) -> None:
    out = write_training(tmp_path / "base")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 10, "loss": NaN, "lr": Infinity}\n')
    result = call("report", str(out), "--json")
    report = json.loads(result.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["grid_step"] == 8
    assert report["last"]["loss"] == {"step": 8, "value": 0.125}
    assert report["last"]["lr"] == {"step": 10, "value": None}
    assert report["unreadable_lines"] == 1


@pytest.mark.parametrize("damage", ["grid", "config"])
def test_what_cannot_be_shown_is_a_line_in_its_place(tmp_path: Path, damage: str) -> None:
    out = write_training(tmp_path / "base")
    if damage == "config":
        (out / "config.yaml").unlink()
    else:
        with (out / "grids" / "step-00000008.png").open("ab") as file:
            file.truncate(32 * 2**20 + 1)
    page = page_of(out)
    (line,) = re.findall(r'<p class="error">(.*?)</p>', page)
    assert {"grid": "step-00000008.png", "config": "config.yaml"}[damage] in line
    assert "newest step 8" in page


def test_a_training_without_metrics_and_grids_has_a_page(tmp_path: Path) -> None:
    out = write_training(tmp_path / "base", grids=False)
    (out / "metrics.jsonl").write_text("")
    page = page_of(out)
    assert "none logged yet" in page
    assert "grid.every_steps" in page


@pytest.mark.slow
def test_a_training_is_reported_and_goes_on_as_if_it_were_not(tmp_path: Path) -> None:
    write_cascade(tmp_path)
    out = tmp_path / "base"
    page = page_of(out)
    assert f"newest step {BASE['num_steps']}" in page
    assert "Training loss" in page
    assert "Learning rate" in page
    result = train(tmp_path, "base", out, "num_steps=8")
    assert result.code == 0, result.err
    assert json.loads(call("report", str(out), "--json").out)["last"]["loss"]["step"] == 8
