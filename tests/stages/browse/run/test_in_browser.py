"""A run watched in a browser from its first shards to its end, and its drops."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.runs import REPOSITORY, command
from tests.stages.browse.browser import chromium, serving

pytestmark = pytest.mark.slow


@contextmanager
def running(out: Path, *settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real run in a process of its own, once it has a plan."""
    words = command("run", "precompute", "--out", str(out), *settings, "--executor", "inline", "--quiet")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=REPOSITORY)
    try:
        for _ in range(600):
            if (out / "plan.json").is_file():
                break
            time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_run_is_watched_live_until_its_end_and_its_drops_are_clicked_through(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["source.num_samples=400", "shard_size=2", "images.sizes_px=[16]", "encoders=[]", "keep_originals=true"]
    with running(out, *settings) as run, serving(out) as address, chromium() as page:
        page.set_default_timeout(120_000)
        page.goto(f"{address}/p/1/")
        assert page.locator("#state strong").text_content() == "precompute: running"
        page.evaluate("window.notLoadedAgain = true")
        bar = page.locator('progress[aria-label="resize"]')
        first = int(bar.get_attribute("value") or 0)
        page.wait_for_function(
            """first => document.querySelector('progress[aria-label="resize"]').value > first""", arg=first
        )
        assert run.wait(timeout=240) == 0
        page.wait_for_function(
            """() => document.querySelector("#state strong").textContent === "precompute: finished" """
        )
        assert page.evaluate("window.notLoadedAgain") is True
        assert (bar.get_attribute("value"), bar.get_attribute("max")) == ("200", "200")
        assert page.locator("#throughput path.curve").count() == 2
        assert page.locator("#lost").is_hidden()

        tab_to(page, '#drops td a[href*="http_404"]')
        page.keyboard.press("Enter")
        page.wait_for_url("**/drops?**reason=http_404**")
        assert "dropped rows: 1 to" in (page.locator("#count").text_content() or "")
        assert "--retry-dropped http_404" in (page.locator("#retry").text_content() or "")
        rows = page.locator("table.drops tbody tr").count()
        assert rows > 0
        page.keyboard.press("/")
        key = page.locator("table.drops tbody tr td").nth(3).text_content() or ""
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        page.wait_for_url("**q=**")
        assert page.locator("table.drops tbody tr").count() == 1


def test_opened_details_and_the_focus_stay_while_the_page_is_refreshed(copy_of_small_run: Path) -> None:
    failed = copy_of_small_run / "quarantine" / "failed"
    failed.mkdir()
    (failed / "resize-00001.txt").write_text("Traceback: the first")
    with serving(copy_of_small_run) as address, chromium() as page:
        page.goto(f"{address}/p/1/")
        tab_to(page, "#failed-resize-00001 summary")
        page.keyboard.press("Enter")
        (failed / "resize-00002.txt").write_text("Traceback: the second")
        page.wait_for_selector("#failed-resize-00002", state="attached")
        assert page.locator("#failed-resize-00001").get_attribute("open") is not None
        assert page.locator("#failed-resize-00002").get_attribute("open") is None
        assert page.evaluate("document.activeElement.textContent") == "resize on shard 00001"


def test_a_server_that_does_not_answer_is_said_until_it_does(small_run: Path) -> None:
    with serving(small_run) as address, chromium() as page:
        page.route("**/live", lambda route: route.fulfill(status=503), times=1)
        page.goto(f"{address}/p/1/")
        assert page.locator("#lost").is_hidden()
        page.wait_for_selector("#lost:not([hidden])")
        page.wait_for_selector("#lost", state="hidden")


@pytest.mark.parametrize("width", [400, 1600])
def test_the_pages_are_readable_narrow_and_wide_dark_and_light(small_run: Path, width: int) -> None:
    backgrounds = []
    with serving(small_run) as address:
        for scheme in ("dark", "light"):
            with chromium(viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
                page.goto(f"{address}/p/1/")
                assert not is_wider_than_window(page)
                backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
                page.goto(f"{address}/p/1/drops")
                assert not is_wider_than_window(page)
    assert len(set(backgrounds)) == 2


def is_wider_than_window(page: Any) -> bool:
    """Whether the page, not only a part of it, has to be scrolled sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def tab_to(page: Any, selector: str, most: int = 60) -> None:
    """Presses Tab until the element has the focus."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} is not reached by {most} times Tab")
