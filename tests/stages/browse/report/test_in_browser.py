"""`report/index.html`, opened as a file in a real browser."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.commands import call
from tests.runs import precompute
from tests.stages.browse.browser import contrast, fits, pixels_shown, started_chromium, watched
from tests.stages.browse.report.test_store_report import CAPTION, write_folder
from tests.stages.browse.store.stores import Given, write_store
from tests.stages.browse.training.trainings import training

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with started_chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The addresses of reports of a run with drops, a store with hostile captions, and a training."""
    folder = tmp_path_factory.mktemp("reports")
    source = f"source={{kind: folder, path: {write_folder(folder / 'images')}}}"
    precompute(folder / "run", source, "images.sizes_px=[16]", "keep_originals=true", "max_drop_fraction=1")
    captions = ["<img src=x onerror=alert(1)>", "ق" * 3000, "w" * 100_000]
    store = write_store(folder / "a store", [[Given(caption) for caption in captions]])
    metrics = "".join(json.dumps({"step": step, "loss": 1 / step, "lr": 0.1}) + "\n" for step in range(1, 500))
    training(folder / "training", metrics, f"where: '{'x' * 300}'\n", grids=[499])
    for path in (folder / "run", store, folder / "training"):
        result = call("report", str(path))
        assert result.code == 0, result.err
    reports = {"run": folder / "run", "store": folder, "training": folder / "training"}
    return {name: (root / "report" / "index.html").as_uri() for name, root in reports.items()}


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_a_report_fits_is_readable_and_asks_for_nothing_else(
    browser: "Browser", pages: dict[str, str], width: int, dark: bool
) -> None:
    for name, address in pages.items():
        with watched(browser, address, width=width, dark=dark) as page:
            page.goto(address)
            assert fits(page), name
            assert contrast(page, "main") > 7, name
            assert contrast(page, ".dim") > 4.5, name
            assert 0 not in pixels_shown(page, "img"), name


def test_its_images_charts_and_captions_are_those_of_the_run(browser: "Browser", pages: dict[str, str]) -> None:
    with watched(browser, pages["run"]) as page:
        page.goto(pages["run"])
        assert page.locator(".pair img").count() == 3
        assert pixels_shown(page, ".pair img") == [16, 16] * 3
        assert page.get_by_text(CAPTION).first.is_visible()
        assert page.locator("svg.chart rect.fill").count() > 3
        assert page.title() == "run"
    with watched(browser, pages["store"]) as page:
        page.goto(pages["store"])
        assert page.get_by_text("<img src=x onerror=alert(1)>").count() == 1


def test_a_training_has_curves_whose_values_are_a_table(browser: "Browser", pages: dict[str, str]) -> None:
    with watched(browser, pages["training"], java_script_enabled=False) as page:
        page.goto(pages["training"])
        figure = page.locator("figure.lines", has_text="Training loss")
        figure.locator("summary").click()
        rows = figure.locator("tbody tr").all_inner_texts()
        assert (rows[0].split(), rows[-1].split()) == (["1", "1"], ["499", "0.002004"])
        assert figure.locator("svg").bounding_box() is not None
