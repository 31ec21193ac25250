"""The pages of a store: what data holds is text, images are those of the store, damage stays where it is."""

import io
import json
import os
import re
import threading
import time
from html import unescape
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from imagen_core.store import Store, write_manifest
from stages.browse.store.images import error_image, heat_map
from stages.browse.store.query import Query
from stages.browse.store.table import SamplesTable
from tests.imagen_core.store.handmade_store import make_store, remove
from tests.stages.browse.clients import client
from tests.stages.browse.store.stores import SIZE_PX, Given, write_store

HOSTILE = [
    Given("<script>alert(1)</script><img src=x onerror=alert(2)>", url="javascript:alert(3)"),
    Given('"><svg onload=alert(4)> {{ 7 * 7 }} {% raw %}'),
    Given("قطة حمراء على العشب"),
    Given("word " * 19_999 + "the end"),
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    return client(write_store(tmp_path_factory.mktemp("hostile") / "store", [HOSTILE]))


def images(page: str) -> list[str]:
    return [unescape(address) for address in re.findall(r'<img [^>]*src="(/p/1/image[^"]*)"', page)]


@pytest.mark.parametrize(
    "address", ["/p/1/", "/p/1/?q=%3Cscript", "/p/1/sample/0/0", "/p/1/sample/0/1", "/p/1/nearest/0/0/0/0"]
)
def test_captions_with_html_are_text(hostile: TestClient, address: str) -> None:
    answer = hostile.get(address)
    assert answer.status_code == 200
    tags = {tag.lower() for tag in re.findall(r"<([a-zA-Z]+)", answer.text)}
    scripts = re.findall(r"<script[^>]*>", answer.text)
    assert scripts == ['<script src="/static/browse.js" defer>']
    assert not re.search(r"<[^>]*\bon[a-z]+=", answer.text)
    assert "javascript:" not in "".join(re.findall(r'(?:href|src)="[^"]*"', answer.text))
    assert "49" not in re.findall(r">([^<]*7 \* 7[^<]*)<", answer.text)
    assert tags <= {
        *("html", "head", "meta", "title", "link", "script", "body", "a", "header", "nav", "span", "bdi", "main", "h"),
        *(
            "p",
            "form",
            "label",
            "input",
            "select",
            "option",
            "button",
            "details",
            "summary",
            "div",
            "datalist",
            "strong",
        ),
        *("ul", "li", "img", "section", "svg", "g", "rect", "text", "figure", "figcaption", "table", "thead", "tbody"),
        *("tr", "th", "td", "code"),
    }


def test_a_caption_of_100_000_characters_is_cut_in_the_grid_and_whole_on_its_page(hostile: TestClient) -> None:
    grid, page = hostile.get("/p/1/").text, hostile.get("/p/1/sample/0/3").text
    assert "the end" not in grid
    assert len(grid) < 100_000
    assert "Show all 100,002 characters" in page
    assert page.count("the end") == 1


def test_the_direction_of_a_caption_is_its_own(hostile: TestClient) -> None:
    assert re.search(r'<span class="caption" dir="auto">قطة', hostile.get("/p/1/").text)
    assert re.search(r'<p class="text" dir="auto">قطة', hostile.get("/p/1/sample/0/2").text)


@pytest.mark.parametrize("codec", ["raw", "png", "jpeg"])
def test_images_are_those_of_the_store_and_kept_by_their_digest(tmp_path: Path, codec: str) -> None:
    store = write_store(tmp_path / "store", [HOSTILE[:2], HOSTILE[:3]], codec=codec)  # type: ignore[arg-type]
    browser = client(store)
    address = images(browser.get("/p/1/sample/1/2").text)[0]
    answer = browser.get(address)
    assert answer.headers["content-type"] == ("image/jpeg" if codec == "jpeg" else "image/png")
    assert "immutable" in answer.headers["cache-control"]
    pixels = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert pixels.shape == (SIZE_PX, SIZE_PX, 3)
    np.testing.assert_allclose(pixels[4, 4], [1, 2, 200], atol=0 if codec != "jpeg" else 4)
    other = browser.get(address.replace("digest=", "digest=0"))
    assert (other.status_code, other.headers["cache-control"]) == (200, "no-store")


@pytest.mark.parametrize(
    "address",
    [
        "sample/0/4",
        "sample/9/0",
        f"sample/{10**30}/0",
        "image/0/0/9",
        "image/0/9/8",
        "heat/0/0/9/0",
        "heat/0/0/0/1",
        "image/0/0/x",
    ],
)
def test_what_the_store_has_not_is_not_found(hostile: TestClient, address: str) -> None:
    assert hostile.get(f"/p/1/{address}").status_code == 404


@pytest.mark.parametrize("query", ["width_min=wide", "sort=nothing"])
def test_a_query_that_means_nothing_is_one_line(hostile: TestClient, query: str) -> None:
    answer = hostile.get(f"/p/1/?{query}")
    assert answer.status_code == 400
    assert "Traceback" not in answer.text


def test_a_sample_page_has_its_origin_its_numbers_and_its_neighbours(tmp_path: Path) -> None:
    rows = [[Given("first one", 640, 480, "https://a.example/1.jpg", "d" * 64)], [Given("second"), Given("third")]]
    browser = client(write_store(tmp_path / "store", rows))
    page = browser.get("/p/1/sample/0/0?at=0").text
    assert "d" * 64 in page
    assert "https://a.example/1.jpg" in page
    assert "640 x 480 px" in page
    assert "2 tokens" in page
    assert "the tokenizer of somebody/unknown is not on this machine" in page
    assert "2 x 4 float32: mean 0.25" in page
    assert "norms of tokens 1 to 1" in page
    assert "samples/00000.parquet" in page
    assert re.findall(r'rel="(prev|next)" href="([^"]*)"', page) == [("next", "/p/1/sample/1/0?at=1")]
    middle = browser.get("/p/1/sample/1/0?at=1").text
    assert re.findall(r'rel="(prev|next)" href="([^"]*)"', middle) == [
        ("prev", "/p/1/sample/0/0?at=0"),
        ("next", "/p/1/sample/1/1?at=2"),
    ]


def test_the_nearest_samples_are_ordered_by_the_cosine_of_their_vectors(tmp_path: Path) -> None:
    vectors = [(1.0, 0.0, 0.0, 0.0), (0.6, 0.8, 0.0, 0.0), (-1.0, 0.0, 0.0, 0.0), (0.8, 0.6, 0.0, 0.0)]
    rows = [Given(f"caption {i}", vector=vector) for i, vector in enumerate(vectors)]
    browser = client(write_store(tmp_path / "store", [rows[:2], rows[2:]]))
    for group in (0, 1):  # of the captions, and of the images
        page = browser.get(f"/p/1/nearest/0/0/{group}/0").text
        assert re.findall(r"cosine ([-0-9.]+)", page) == ["0.8", "0.6", "-1"]
        assert re.findall(r'href="/p/1/sample/(\d/\d)"', page) == ["0/0", "1/1", "0/1", "1/0"]
        assert "3 were compared." in page


def test_a_heat_map_is_blue_below_zero_and_red_above() -> None:
    pixels = heat_map(np.array([[-1.0, 0.0, 1.0, np.nan]], np.float32)).tolist()
    assert pixels == [[[33, 102, 172], [247, 247, 247], [178, 24, 43], [0, 0, 0]]]
    assert heat_map(np.ones((3, 4096), np.float16)).shape == (3, 512, 3)
    assert heat_map(np.zeros((0, 8), np.float32)).shape == (0, 8, 3)


@pytest.mark.parametrize("group", ["images-4", "text-t5", "samples"])
def test_a_truncated_file_shows_its_error_in_its_place(tmp_path: Path, group: str) -> None:
    make_store(tmp_path / "store", sizes=(8, 4))
    damaged = tmp_path / "store" / group / "00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    browser = client(tmp_path / "store")
    pages = {address: browser.get(f"/p/1/{address}") for address in ("", "sample/1/0", "sample/0/0", "image/1/0/4")}
    assert {page.status_code for page in pages.values()} == {200}
    assert not [page for page in pages.values() if "Traceback" in page.text]
    errors = re.findall(r'class="error">([^<]*)<', pages["sample/1/0"].text)
    assert any(f"{group}/00001.parquet" in line for line in errors)
    assert re.findall(r'class="error">([^<]*)<', pages["sample/0/0"].text) == []
    is_image = group == "images-4"
    assert pages["image/1/0/4"].headers["content-type"] == ("image/svg+xml" if is_image else "image/png")
    assert len(images(pages["sample/1/0"].text)) == (1 if is_image else 2)


def test_an_error_in_the_place_of_an_image_is_text() -> None:
    text = error_image("<script>alert(1)</script> & more").decode()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_removed_sample_is_on_no_page_from_then_on(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    browser = client(tmp_path / "store")
    assert "sample/1/1" in browser.get("/p/1/").text
    assert browser.get("/p/1/image/1/1/8").status_code == 200
    remove(tmp_path / "store", key=["001-001"])
    page = browser.get("/p/1/").text
    assert "sample/1/1" not in page
    assert "sample/1/2" in page
    for address in ("sample/1/1", "image/1/1/8", "heat/1/1/0/0", "nearest/1/1/0/0"):
        assert browser.get(f"/p/1/{address}").status_code == 404


def test_a_store_without_a_manifest_says_so_and_is_there_once_it_has_one(tmp_path: Path) -> None:
    make_store(tmp_path / "run" / "store")
    (tmp_path / "run" / "plan.json").write_text('{"workflow": "precompute", "stages": [], "transient_groups": []}')
    manifest = tmp_path / "run" / "store" / "manifest.json"
    kept = manifest.read_bytes()
    manifest.unlink()
    browser = client(tmp_path / "run")
    answer = browser.get("/p/2/")
    assert answer.status_code == 503
    assert "no manifest.json; a run writes it when all shards are finished" in answer.text
    manifest.write_bytes(kept)
    assert "12</strong> samples" in browser.get("/p/2/").text
    manifest.unlink()  # as a run does that makes some of it again
    assert "12</strong> samples" in browser.get("/p/2/").text
    assert browser.get("/p/2/sample/0/0").status_code == 200


def test_the_nearest_are_searched_in_the_shards_that_can_be_read(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [[Given(name)] for name in ("one", "two", "three", "four")])
    for group, shard in (("samples", 1), ("text-t5", 2)):
        damaged = store / group / f"{shard:05d}.parquet"
        damaged.write_bytes(damaged.read_bytes()[:-20])
    page = client(store).get("/p/1/nearest/0/0/0/0").text
    assert re.findall(r'<span class="caption" dir="auto">(.*?)</span>', page) == ["four"]
    errors = re.findall(r'<p class="error">(.*?)</p>', page)
    assert ["samples/00001" in errors[0], "text-t5/00002" in errors[1], len(errors)] == [True, True, 2]


@pytest.mark.parametrize("name", ["parquet", "hdf5", "run"])
def test_a_store_of_schema_1_has_all_of_its_pages(name: str) -> None:
    folder = Path("tests/fixtures/stores_0_1") / name
    browser = client(folder)
    place = "/p/2" if name == "run" else "/p/1"
    page = browser.get(f"{place}/").text
    assert '<p class="error"' not in page
    (sample, *_) = re.findall(rf'href="({place}/sample/[^"?]*)', page)
    page = browser.get(sample).text
    assert '<p class="error"' not in page
    for address in (
        *re.findall(r'<img [^>]*src="([^"]*)"', page),
        *re.findall(rf'href="({place}/nearest/[^"]*)"', page),
    ):
        answer = browser.get(unescape(address))
        assert (answer.status_code, "svg" in answer.headers["content-type"]) == (200, False)
        assert '<p class="error"' not in (answer.text if "html" in answer.headers["content-type"] else "")


@pytest.mark.slow
def test_pages_are_answered_while_the_store_is_written_again(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [[Given(f"{shard} {row}") for row in range(20)] for shard in range(3)])
    browser, manifest, statuses = client(store), store / "manifest.json", list[int]()
    addresses = ["/p/1/", "/p/1/?q=1", "/p/1/sample/1/3?at=23", "/p/1/image/2/1/8", "/p/1/nearest/0/1/0/0"] * 2

    def look() -> None:
        statuses.extend(browser.get(address).status_code for address in addresses)

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    for second in count(1):
        os.utime(manifest, (second, second))  # as a compaction leaves it: another version
        if not any(reader.is_alive() for reader in readers):
            break
        time.sleep(0.1)
    assert statuses == [200] * 30


def test_a_table_that_is_closed_answers_those_who_use_it_and_then_leaves_no_file(tmp_path: Path) -> None:
    table = SamplesTable(Store.open(write_store(tmp_path / "store", [[Given("one"), Given("two")]])), dict)
    folder = Path(table._folder.name)
    assert table.wait(60)
    with table.used(), table.asking(Query.parse({"q": "one"}, table.fields)) as answers:
        table.close()
        table.close()
        assert answers.count() == 1
        assert folder.is_dir()
    assert not folder.exists()


def test_a_page_without_samples_says_why(tmp_path: Path, hostile: TestClient) -> None:
    page = client(write_store(tmp_path / "store", [[]])).get("/p/1/").text
    assert "The store has no samples." in page
    assert "Distributions" not in page
    page = hostile.get("/p/1/?q=nowhere").text
    assert "No sample fits." in page
    assert page.count("<strong>0</strong>") == 1


def test_a_store_of_embeddings_alone_has_all_but_images(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [[Given("one fox"), Given("two")]])
    raw = json.loads((store / "manifest.json").read_bytes())
    del raw["groups"]["images-8"]
    for shard in raw["shards"]:
        del shard["files"]["images-8"]
    write_manifest(
        store / "manifest.json", {key: raw[key] for key in ("writer", "input_rows", "groups")}, raw["shards"]
    )
    browser = client(store)
    assert re.findall(r'<span class="caption" dir="auto">(.*?)</span>', browser.get("/p/1/?q=fox").text) == ["one fox"]
    page = browser.get("/p/1/sample/0/0").text
    assert "The store has no images." in page
    assert "2 x 4 float32" in page
    assert '<p class="error"' not in page
    assert "two" in browser.get("/p/1/nearest/0/0/0/0").text
