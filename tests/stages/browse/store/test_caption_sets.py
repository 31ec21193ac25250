"""Stores with several sets of captions: all are searched, each has its filters, and pages say which one was found."""

import re
from pathlib import Path

import pytest

from imagen_core.store import Store
from stages.browse.store.grid import page_of
from stages.browse.store.query import Query, QueryError
from stages.browse.store.table import Row, SamplesTable
from tests.imagen_core.store.caption_sets_added import add_caption_sets
from tests.stages.browse.clients import client
from tests.stages.browse.store.stores import Given, write_store

LONG = [["a red fox in the snow", "a map"], ["one blue bird", "a fox and a bird"]]
SHORT = {(0, 0): ["animal", "FOX!"], (0, 1): [], (1, 0): ["bird"], (1, 1): ["wild animals"]}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    root = write_store(tmp_path / "store", [[Given(caption) for caption in shard] for shard in LONG])
    add_caption_sets(root, {"short": lambda shard, row: SHORT[shard, row]}, {"long": 0.5, "short": 0.5})
    return root


@pytest.fixture
def table(store: Path) -> SamplesTable:
    table = SamplesTable(Store.open(store), dict)
    assert table.wait(60)
    assert table.problems == []
    return table


def rows(table: SamplesTable, **given: str) -> list[Row]:
    query = Query.parse(given, table.fields, table.caption_sets)
    with table.asking(query) as answers:
        return page_of(answers, 1).rows


def test_a_search_covers_all_sets_and_a_row_shows_the_set_that_fits(table: SamplesTable) -> None:
    found = [(row.key, row.sets, row.text) for row in rows(table, q="FOX")]
    assert found == [
        ("0-0", ("long", "short"), "a red fox in the snow"),
        ("1-1", ("long",), "a fox and a bird"),
    ]
    only = [(row.key, row.sets, row.text) for row in rows(table, q="animal")]
    assert only == [("0-0", ("short",), "animal\nFOX!"), ("1-1", ("short",), "wild animals")]


def test_one_set_alone_is_searched_and_shown_where_it_is_chosen(table: SamplesTable) -> None:
    assert [(row.key, row.text) for row in rows(table, q="bird", captions="short")] == [("1-0", "bird")]
    assert [row.key for row in rows(table, q="bird", captions="long")] == ["1-0", "1-1"]
    assert [row.text for row in rows(table, captions="short")] == ["animal\nFOX!", "", "bird", "wild animals"]
    assert [row.text for row in rows(table)] == [caption for shard in LONG for caption in shard]


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ({"characters_min": "6", "characters_max": "16"}, ["1-0", "1-1"]),
        ({"characters/short_max": "4"}, ["1-0"]),
        ({"characters/short_min": "11"}, ["0-0", "1-1"]),
        ({"tokens.t5_min": "5"}, ["0-0", "1-1"]),
        ({"tokens.t5/short_min": "2"}, ["0-0", "1-0", "1-1"]),
        ({"sort": "characters/short"}, ["1-0", "0-0", "1-1", "0-1"]),
    ],
)
def test_each_set_has_its_own_lengths_and_a_sample_without_captions_has_none(
    table: SamplesTable, given: dict[str, str], keys: list[str]
) -> None:
    assert [row.key for row in rows(table, **given)] == keys


def test_an_address_keeps_the_set_and_one_that_is_not_there_is_refused(table: SamplesTable) -> None:
    query = Query.parse({"q": "x", "captions": "short"}, table.fields, table.caption_sets)
    assert query.address(page=2) == "?q=x&captions=short&page=2"
    with pytest.raises(QueryError, match="captions=shorts: the store has the captions long, short"):
        Query.parse({"captions": "shorts"}, table.fields, table.caption_sets)


def test_the_grid_offers_the_sets_and_says_in_which_one_it_found_a_sample(store: Path) -> None:
    browser = client(store)
    page = browser.get("/p/1/?q=wild").text
    assert re.findall(r'<span class="caption" dir="auto">(.*?)</span>\s*<span class="dim">(.*?)</span>', page) == [
        ("wild animals", "in short")
    ]
    assert re.findall(r'<option value="(\w*)" *>', page.partition('name="captions"')[2].partition("</select>")[0]) == [
        "",
        "long",
        "short",
    ]
    assert browser.get("/p/1/?captions=other").status_code == 400


def test_a_store_of_one_set_has_no_choice_of_sets(tmp_path: Path) -> None:
    page = client(write_store(tmp_path / "one", [[Given("a fox")]])).get("/p/1/?q=fox").text
    assert 'name="captions"' not in page
    assert "characters of the caption<" in page


def test_a_file_of_a_set_that_cannot_be_read_leaves_the_others(store: Path) -> None:
    damaged = store / "captions-short" / "00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    table = SamplesTable(Store.open(store), dict)
    assert table.wait(60)
    assert [str(damaged) in problem for problem in table.problems] == [True]
    assert [row.key for row in rows(table, q="animal")] == ["0-0"]
    assert [row.key for row in rows(table, q="bird")] == ["1-0", "1-1"]
