"""Trainings, samplings and evaluations in a real browser."""

import json
import math
import random
from pathlib import Path

import pytest

from imagen_core.train.logs import JsonLines
from stages.evaluation.report import write_report
from tests.stages.browse.browser import chromium, contrast, fits, serving, tab_to
from tests.stages.browse.training.trainings import lines, sampling, training

pytestmark = pytest.mark.slow


def curves(steps: int, seed: int = 0) -> str:
    """Metrics as a training has them."""
    noise = random.Random(seed)
    rows: list[dict[str, float]] = []
    for step in range(10, steps + 1, 10):
        loss = 0.1 + math.exp(-step / steps * 3) + noise.gauss(0, 0.03)
        rows.append(
            {
                "step": step,
                "loss": loss,
                "grad_norm": loss * 2,
                "lr": 1e-4,
                "images_per_s": 110 + noise.random(),
                "loader_wait": 0.02 * noise.random(),
                "step_s": 0.1,
            }
        )
        if step % 100 == 0:
            rows.append({"step": step, "validation_loss": loss + 0.02, "validation_loss_without_ema": loss + 0.03})
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_training_is_followed_while_it_runs(tmp_path: Path) -> None:
    root = training(tmp_path / "a", "", grids=[100])
    log = JsonLines(root / "metrics.jsonl", 0)
    log.scalars(100, {"loss": 2.0})
    with serving(root) as address, chromium(viewport={"width": 1600, "height": 900}) as page:
        page.goto(f"{address}/p/1/")
        assert page.locator(".last b").all_inner_texts() == ["2"]
        log.scalars(200, {"loss": 1.0})
        training(root, (root / "metrics.jsonl").read_text(), grids=[200])
        page.locator(".last", has_text="loss 1 at step 200").wait_for()
        page.locator("#grid-label", has_text="200").wait_for()
        assert page.locator("#grid").get_attribute("src") == "/p/1/grids/200.png"
        log.close()
        resumed = JsonLines(root / "metrics.jsonl", 100)  # a kill, and a start from step 100
        resumed.scalars(150, {"loss": 1.5})
        resumed.close()
        page.locator(".last", has_text="loss 1.5 at step 150").wait_for()
        assert page.locator("#ended").inner_text() == ""


def test_the_slider_of_grids_is_moved_by_keys(tmp_path: Path) -> None:
    with serving(training(tmp_path / "a", curves(300), grids=[100, 200, 300])) as address, chromium() as page:
        page.goto(f"{address}/p/1/")
        page.locator("#grid-step").focus()
        seen = []
        for key in ("ArrowLeft", "ArrowLeft", "ArrowLeft", "End"):
            page.keyboard.press(key)
            page.wait_for_load_state("networkidle")
            seen.append(
                (
                    page.locator("#grid-label").inner_text(),
                    page.locator("#grid").evaluate("image => image.naturalWidth"),
                )
            )
        assert seen == [("200", 4), ("100", 4), ("100", 4), ("300", 4)]


def test_curves_are_smoothed_and_compared_by_keyboard_alone(tmp_path: Path) -> None:
    roots = [training(tmp_path / name, curves(2000, n), f"seed: {n}\n") for n, name in enumerate(("first", "second"))]
    with serving(*roots) as address, chromium() as page:
        page.goto(address)
        page.get_by_role("cell", name="first", exact=True).get_by_role("link").focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/p/1/")
        assert page.locator(".faint").count() == 0
        page.get_by_label("Smoothing").focus()
        with page.expect_navigation():
            page.keyboard.press("ArrowDown")
        assert "smoothing=0.6" in page.url
        assert page.locator(".faint").count() > 0
        page.get_by_role("link", name="Lay over second").focus()
        with page.expect_navigation():
            page.keyboard.press("Enter")
        charts = page.locator("figure", has=page.get_by_text("Training loss", exact=False))
        assert charts.first.locator(".legend bdi").all_inner_texts() == ["first", "second"]
        assert page.locator(".differences code").all_inner_texts() == ["seed", "0", "1"]
        page.get_by_role("checkbox", name="second").focus()
        with page.expect_navigation():
            page.keyboard.press("Space")
        assert page.url.endswith("?place=1")


def test_a_curve_says_its_values_at_the_pointer_and_by_keys(tmp_path: Path) -> None:
    text = "".join(json.dumps({"step": step, "loss": step / 8, "grad_norm": 1.0}) + "\n" for step in range(1, 10))
    text += (
        json.dumps({"step": 9, "validation_loss/a": 0.5}) + "\n" + json.dumps({"step": 9, "validation_loss/b": 0.25})
    )
    root = training(tmp_path / "a", text + "\n")
    with serving(root) as address, chromium() as page:
        page.goto(f"{address}/p/1/")
        figure = page.locator("figure.lines", has_text="Training loss")
        readout, chart = figure.locator(".readout"), figure.locator("svg")
        assert not readout.is_visible()
        chart.hover()
        assert readout.inner_text() == "step 5: loss 0.625"
        assert figure.locator("g.readings circle").count() == 1
        page.mouse.move(0, 0)
        assert not readout.is_visible()
        tab_to(page, "svg[data-ends]")
        assert readout.inner_text() == "step 9: loss 1.125"
        seen = []
        for key in ("ArrowLeft", "ArrowLeft", "ArrowRight", "Home", "PageUp", "End"):
            page.keyboard.press(key)
            seen.append(chart.get_attribute("aria-valuetext"))
        assert seen == [f"step {step}: loss {step / 8:g}" for step in (8, 7, 8, 1, 2, 9)]
        page.keyboard.press("ArrowLeft")
        with (root / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 10, "loss": 4.0}) + "\n")
        page.locator(".last", has_text="at step 10").wait_for()
        assert readout.inner_text() == "step 8: loss 1", "the chart that is drawn again keeps its place and the focus"
        assert page.evaluate("document.activeElement.matches('svg[data-ends]')")
        page.keyboard.press("Escape")
        assert not readout.is_visible()
        both = page.locator("figure.lines", has_text="Validation loss")
        both.locator("svg").hover()
        assert both.locator(".readout").inner_text() == "step 9: a 0.5; b 0.25"


def test_without_scripts_a_table_has_the_values(tmp_path: Path) -> None:
    root = training(tmp_path / "a", lines([1, 2, 3], loss=1.0))
    with serving(root) as address, chromium(java_script_enabled=False) as page:
        page.goto(f"{address}/p/1/")
        figure = page.locator("figure.lines").first
        figure.locator("summary").click()
        assert [row.split() for row in figure.locator("tbody tr").all_inner_texts()] == [
            ["1", "2"],
            ["2", "3"],
            ["3", "4"],
        ]
        assert figure.locator("svg").get_attribute("tabindex") is None


def test_a_sweep_shows_its_plot_and_images_and_says_what_is_missing(tmp_path: Path) -> None:
    rows = []
    for weight in (1.0, 3.0, 7.5):
        sampling(
            tmp_path / f"guidance-{weight:g}", ["a red fox in the snow", "قطة حمراء", "<b>x</b>" * 100], sizes=(16, 32)
        )
        rows.append(
            {
                "name": f"guidance-{weight:g}",
                "guidance": weight,
                "images": 3,
                "frechet_distance": 20 / weight,
                "clip_score": 15 + weight,
            }
        )
    write_report(tmp_path, {"features_model": "inception", "clip_model": None, "rows": rows})
    (tmp_path / "guidance-3" / "images-32" / "00001.png").unlink()
    with serving(tmp_path) as address, chromium() as page:
        page.goto(f"{address}/p/1/")
        page.get_by_text("not there, or not generated yet").wait_for()
        assert page.locator(".prompt img").count() == 8
        assert page.locator(".prompt img").first.evaluate("image => image.naturalWidth") == 32
        assert page.locator(".prompt b").count() == 0
        page.keyboard.press("/")
        page.keyboard.type("FOX")
        with page.expect_navigation():
            page.keyboard.press("Enter")
        assert page.locator(".prompt p.text").all_inner_texts() == ["a red fox in the snow"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_pages_are_readable_narrow_and_wide_light_and_dark(tmp_path: Path, width: int, scheme: str) -> None:
    first = training(
        tmp_path / "a-training-with-quite-a-long-name", curves(2000), f"where: '{'x' * 300}'\n", grids=[1000, 2000]
    )
    folders = (
        first,
        training(tmp_path / "b", lines([1], loss=0.0)),
        sampling(tmp_path / "s", ["a " * 200, "x" * 5000], sizes=(64, 128)),
    )
    with serving(*folders) as address, chromium(viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
        for path in ("/p/1/", "/p/1/settings?other=2", "/compare?place=1&place=2", "/p/3/"):
            page.goto(address + path)
            assert fits(page), path
            assert contrast(page, "main h1") > 7
        page.goto(f"{address}/p/1/")
        size = page.locator("svg.chart text").first.evaluate("text => text.getBoundingClientRect().height")
        assert size >= 9  # pixels
        assert contrast(page, ".legend .dim") > 4.5
