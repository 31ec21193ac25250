"""The pages of a store in a real browser: search, filter, sort and a sample, by mouse and by keyboard."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from imagen_core.store import Store
from tests.imagen_core.store.caption_sets_added import add_caption_sets
from tests.runs import EMOJI, precompute
from tests.stages.browse.browser import contrast, fits, pixels_shown, serving, started_chromium, tab_to, watched
from tests.stages.browse.store.stores import Given, write_store

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow
NUM_SAMPLES = 100


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with started_chromium() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over real images where the shared data is present, else over the demo's scenes."""
    folder = tmp_path_factory.mktemp("browse")
    source = [f"source.num_samples={NUM_SAMPLES}"]
    if EMOJI.is_dir():
        source = ["source.kind=folder", f"source.path={some_emoji(folder / 'emoji')}"]
    precompute(folder / "run", *source, "shard_size=40", "images.sizes_px=[16,128]")
    return folder / "run"


def some_emoji(folder: Path) -> Path:
    folder.mkdir()
    with (EMOJI / "captions.tsv").open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))[:NUM_SAMPLES]
    for row in rows:
        shutil.copyfile(EMOJI / "images" / row["file"], folder / row["file"])
        (folder / row["file"]).with_suffix(".txt").write_text(row["caption"], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    with serving(run) as url:
        yield url


def test_search_filter_sort_and_sample_show_what_the_store_has(browser: "Browser", run: Path, address: str) -> None:
    store = Store.open(run / "store")
    captions = ["\n".join(sample.captions) for sample in store]
    word = max(captions[0].split(), key=len)
    fitting = [caption for caption in captions if word.lower() in caption.lower()]
    with watched(browser, address) as page:
        page.goto(address)
        page.get_by_role("row").filter(has_text="store").get_by_role("link").last.click()
        assert page.locator("main strong").first.inner_text() == str(len(store))
        assert page.locator(".grid li").count() == 60
        page.get_by_role("link", name="Next").first.click()
        assert page.locator(".grid li").count() == len(store) - 60
        page.get_by_label("Captions with").fill(word.upper())
        page.keyboard.press("Enter")
        page.wait_for_url("**q=**")
        assert [text.strip() for text in page.locator(".grid .caption").all_inner_texts()] == fitting
        assert set(pixels_shown(page, ".grid img")) == {128}
        page.get_by_label("Sort by").select_option("characters")
        page.get_by_role("button", name="Show").click()
        page.wait_for_url("**sort=characters**")
        shown = page.locator(".grid .caption").all_inner_texts()
        assert [len(text) for text in shown] == sorted(map(len, fitting))
        page.locator(".grid a").first.click()
        page.wait_for_url("**/sample/**")
        assert page.locator("p.text").first.inner_text() == shown[0]
        assert page.locator(".token").all_inner_texts()[-1] == "</s>"
        assert pixels_shown(page, "figure img") == [16, 16, 128, 128]
        assert pixels_shown(page, "img.heat")[0] == 64


def test_a_bar_filters_the_grid_and_its_condition_is_cleared(browser: "Browser", address: str) -> None:
    with watched(browser, address) as page:
        page.goto(f"{address}/p/2/")
        bar = page.locator("section", has_text="tokens of t5").locator("a.bar").nth(2)
        count = int((bar.get_attribute("aria-label") or "").rpartition(": ")[2])
        bar.click()
        page.wait_for_url("**tokens.t5**")
        assert page.locator("main strong").first.inner_text() == str(count)
        assert page.locator("a.bar.chosen").count() == 1
        page.get_by_role("link", name="clear").click()
        page.wait_for_url("**/p/2/?")
        assert page.locator("main strong").first.inner_text() != str(count)


def test_the_keyboard_alone_finds_and_opens_a_sample_and_enlarges_it(browser: "Browser", address: str) -> None:
    with watched(browser, address) as page:
        page.goto(f"{address}/p/2/")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("/")
        page.keyboard.type("a")
        page.keyboard.press("Enter")
        page.wait_for_url("**q=a")
        tab_to(page, ".grid a")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        page.wait_for_url("**/sample/**at=0")
        first = page.url
        tab_to(page, "button[data-zoom='4']")
        page.keyboard.press("Enter")
        assert page.locator("#image-16").evaluate("(image) => [image.width, image.height]") == [64, 64]
        page.keyboard.press("ArrowRight")
        page.wait_for_url("**at=1")
        page.keyboard.press("ArrowLeft")
        page.wait_for_url(first)


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_the_pages_fit_and_are_readable(browser: "Browser", address: str, width: int, dark: bool) -> None:
    with watched(browser, address, width=width, dark=dark) as page:
        for path in ("", "p/2/", "p/2/?width_min=1&q=a", "p/2/sample/0/0", "p/2/nearest/0/0/0/0"):
            page.goto(f"{address}/{path}")
            assert fits(page), path
            assert contrast(page) > 7, path
        assert contrast(page, "a[href]") > 4.5


def test_hostile_captions_run_nothing_and_fit(browser: "Browser", tmp_path: Path) -> None:
    captions = [
        "<script>document.title='x'</script>",
        "<img src=x onerror=\"document.title='x'\">",
        "ق" * 5000,
        "w" * 100_000,
    ]
    store = write_store(tmp_path / "<b>store", [[Given(caption) for caption in captions]])
    with serving(store) as url, watched(browser, url, width=400) as page:
        for path in ("p/1/", *(f"p/1/sample/0/{row}" for row in range(4))):
            page.goto(f"{url}/{path}")
            assert page.title() != "x"
            assert fits(page), path
        assert page.locator("details p.text").inner_text() == ""
        page.get_by_text("Show all 100,000 characters").click()
        assert len(page.locator("details p.text").inner_text()) == 100_000
        page.goto(f"{url}/p/1/sample/0/2")
        assert page.locator("p.text").first.evaluate("(text) => getComputedStyle(text).direction") == "rtl"


def test_one_of_several_sets_of_captions_is_chosen_and_searched(browser: "Browser", tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [[Given("a red fox"), Given("a map")]])
    add_caption_sets(
        store, {"short": lambda shard, row: ["animal", "fox"][row : row + 1]}, {"long": 1.0, "short": 1.0}
    )
    with serving(store) as url, watched(browser, url, width=400) as page:
        page.goto(f"{url}/p/1/?q=fox")
        assert page.locator(".grid li").all_inner_texts() == ["a red fox\nin long", "fox\nin short"]
        page.get_by_label("Set of captions").select_option("short")
        page.get_by_role("button", name="Show").click()
        page.wait_for_url("**captions=short**")
        assert page.locator(".grid .caption").all_inner_texts() == ["fox"]
        assert fits(page)
        page.locator(".grid a").click()
        page.wait_for_url("**/sample/0/1**")
        page.get_by_role("link", name="All that fit").click()
        page.wait_for_url("**captions=short**")


def test_a_truncated_shard_is_shown_as_an_error_in_its_place_and_breaks_nothing(
    browser: "Browser", tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", [[Given("one")], [Given("two")]])
    damaged = store / "images-8" / "00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with serving(store) as url, watched(browser, url) as page:
        page.goto(f"{url}/p/1/")
        page.wait_for_load_state("networkidle")
        assert pixels_shown(page, ".grid img") == [8, 8, 150, 150]
        page.goto(f"{url}/p/1/sample/1/0")
        assert "images-8/00001.parquet" in page.locator(".error").first.inner_text()
        assert page.locator("p.text").inner_text() == "two"
