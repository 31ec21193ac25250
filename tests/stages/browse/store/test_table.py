"""Queries over the samples of a store: the values are known, as the store is made from them."""

from pathlib import Path
from typing import Any

import pytest

from imagen_core import store as st
from imagen_core.store import Store
from stages.browse.store.grid import PAGE_ROWS, Histogram, histogram_of, page_of
from stages.browse.store.query import Query, QueryError
from stages.browse.store.table import SamplesTable
from tests.imagen_core.store.arrays_added import add_arrays
from tests.imagen_core.store.handmade_store import make_store, remove
from tests.stages.browse.store.stores import Given, write_store

ROWS = [
    [
        Given(
            "A red fox",
            300,
            200,
            "https://user:secret@a.example:8/x.jpg",
            "a" * 64,
            3,
            {"score": 0.5, "kind": "photo"},
        ),
        Given(
            "a blue FOX in the snow", 200, 300, "https://b.example/?q=https://a.example", "b" * 64, 3, {"score": 0.9}
        ),
    ],
    [
        Given("Äpfel 100% 'quoted'_", 600, 200, None, "a" * 64, 7, {"score": float("nan"), "kind": "map"}),
        Given("nothing here at all to see", 200, 200, "https://a.example/y", "c" * 64, None, {"kind": "photo"}),
    ],
]


@pytest.fixture(params=["parquet", "hdf5"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> SamplesTable:
    return filled(write_store(tmp_path / "store", ROWS, {"score": "float", "kind": "text"}, request.param))


def filled(store: Path, duplicates: dict[tuple[int, int], str] | None = None) -> SamplesTable:
    table = SamplesTable(Store.open(store), lambda: duplicates or {})
    assert table.wait(60)
    return table


def keys(table: SamplesTable, **given: str) -> list[str]:
    query = Query.parse({name.replace("__", "."): value for name, value in given.items()}, table.fields)
    with table.asking(query) as answers:
        page = page_of(answers, 1)
    assert page.count == len(page.rows)
    return [row.key for row in page.rows]


def histogram(table: SamplesTable, key: str, **given: str) -> Histogram:
    query = Query.parse(given, table.fields)
    field = next(field for field in table.fields if field.key == key)
    with table.asking(query) as answers:
        found = histogram_of(answers, table, field, query)
    assert found is not None
    return found


def counts(found: Histogram) -> dict[str, float]:
    return {bar.label: bar.count for bar in found.chart.bars if bar.count}


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ("fox", ["0-0", "0-1"]),
        ("FOX IN", ["0-1"]),
        ("äPFEL", ["1-0"]),
        ("100%", ["1-0"]),
        ("%", ["1-0"]),
        ("'quoted'_", ["1-0"]),
        ("' OR 1=1 --", []),
        ("", ["0-0", "0-1", "1-0", "1-1"]),
    ],
)
def test_a_search_finds_a_part_of_a_caption_whatever_its_case(
    table: SamplesTable, search: str, expected: list[str]
) -> None:
    assert keys(table, q=search) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"width_min": "300"}, ["0-0", "1-0"]),
        ({"width_min": "201", "width_max": "300"}, ["0-0"]),
        ({"aspect_min": "1.4", "aspect_max": "1.6"}, ["0-0"]),
        ({"tokens__t5_max": "3"}, ["0-0", "1-0"]),
        ({"label": "3"}, ["0-0", "0-1"]),
        ({"host": "a.example"}, ["0-0", "1-1"]),
        ({"host": "b.example"}, ["0-1"]),
        ({"copies_min": "2"}, ["0-0", "1-0"]),
        ({"column__kind": "photo"}, ["0-0", "1-1"]),
        ({"column__score_min": "0.6"}, ["0-1"]),
        ({"column__kind": "photo' OR '1'='1"}, []),
        ({"q": "fox", "width_max": "250", "label": "3"}, ["0-1"]),
    ],
)
def test_filters_choose_by_value_and_together(table: SamplesTable, given: dict[str, str], expected: list[str]) -> None:
    assert keys(table, **given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"sort": "width"}, ["0-1", "1-1", "0-0", "1-0"]),
        ({"sort": "width", "order": "descending"}, ["1-0", "0-0", "0-1", "1-1"]),
        ({"sort": "column.score"}, ["0-0", "0-1", "1-0", "1-1"]),
        ({"order": "descending"}, ["1-1", "1-0", "0-1", "0-0"]),
    ],
)
def test_samples_are_sorted_and_those_without_a_value_are_last(
    table: SamplesTable, given: dict[str, str], expected: list[str]
) -> None:
    assert keys(table, **given) == expected


def test_bars_count_the_samples_and_their_addresses_choose_them(table: SamplesTable) -> None:
    found = histogram(table, "height")
    assert sum(bar.count for bar in found.chart.bars) == 4
    for bar in found.chart.bars:
        assert bar.href is not None
        assert len(chosen(table, bar.href)) == bar.count
    labels = histogram(table, "label")
    assert counts(labels) == {"3": 2, "7": 1}
    assert chosen(table, str(labels.chart.bars[0].href)) == ["0-0", "0-1"]


def chosen(table: SamplesTable, address: str) -> list[str]:
    from urllib.parse import parse_qsl

    return keys(table, **{name.replace(".", "__"): value for name, value in parse_qsl(address.lstrip("?"))})


def test_a_chart_leaves_out_its_own_condition_and_keeps_the_others(table: SamplesTable) -> None:
    found = histogram(table, "label", label="7", q="fox")
    assert counts(found) == {"3": 2}
    assert found.clear == "?q=fox"
    assert [bar.chosen for bar in histogram(table, "label", label="7").chart.bars] == [False, True]


def test_values_far_out_are_in_the_outer_bars(tmp_path: Path) -> None:
    rows = [Given("a", width=100 + i % 50) for i in range(400)] + [Given("a", width=1_000_000)]
    table = filled(write_store(tmp_path / "store", [rows]))
    found = histogram(table, "width")
    assert sum(bar.count for bar in found.chart.bars) == 401
    last = found.chart.bars[-1]
    assert last.label.endswith("and more")
    assert "0-400" in chosen(table, f"{last.href}&sort=width&order=descending")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width_min": "wide"}, "width_min=wide: give a number"),
        ({"width_max": "nan"}, "width_max=nan: give a number"),
        ({"sort": "key; DROP TABLE samples"}, "sort=key; DROP TABLE samples: samples have no such field"),
    ],
)
def test_a_value_that_means_nothing_is_refused(table: SamplesTable, given: dict[str, str], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        Query.parse(given, table.fields)


def test_excluded_and_removed_samples_are_in_no_answer(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", excluded={0: [1], 2: [0]})
    remove(tmp_path / "store", key=["000-003"])
    assert keys(filled(tmp_path / "store")) == [key for key in made.keys if key != "000-003"]


def test_buckets_and_scores_are_fields(tmp_path: Path) -> None:
    make_store(tmp_path / "store", buckets=True)
    spec = st.ArraySpec.of("float32", [])
    add_arrays(tmp_path / "store", "beauty", spec, [st_array(i) for i in range(12)], "parquet")
    table = filled(tmp_path / "store")
    assert keys(table, array__beauty_min="9.5") == ["002-002", "002-003"]
    buckets = counts(histogram(table, "bucket"))
    assert sum(buckets.values()) == 12
    assert set(buckets) == {"5 x 3", "4 x 4", "3 x 5"}


def st_array(value: float) -> Any:
    import numpy as np

    return np.asarray(value, np.float32)


def test_what_a_search_for_duplicates_found_is_a_field(tmp_path: Path) -> None:
    table = filled(
        write_store(tmp_path / "store", ROWS, {"score": "float", "kind": "text"}), {(1, 0): "near_duplicate"}
    )
    assert keys(table, duplicate="near_duplicate") == ["1-0"]


def test_a_truncated_shard_is_named_and_the_others_are_there(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", ROWS, {"score": "float", "kind": "text"})
    damaged = store / "samples" / "00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    table = filled(store)
    assert keys(table) == ["0-0", "0-1"]
    assert [str(damaged) in problem for problem in table.problems] == [True]


def test_without_the_embeddings_of_a_shard_its_samples_have_no_lengths(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", ROWS, {"score": "float", "kind": "text"})
    (store / "text-t5" / "00000.parquet").unlink()
    table = filled(store)
    assert keys(table) == ["0-0", "0-1", "1-0", "1-1"]
    assert keys(table, tokens__t5_min="1") == ["1-0", "1-1"]
    assert ["00000.parquet" in problem for problem in table.problems] == [True]


def test_pages_follow_each_other_and_one_beyond_the_last_is_the_last(tmp_path: Path) -> None:
    table = filled(write_store(tmp_path / "store", [[Given(f"number {i}") for i in range(PAGE_ROWS + 5)]]))
    with table.asking(Query.parse({}, table.fields)) as answers:
        pages = [page_of(answers, number) for number in (1, 2, 99, -4)]
    assert [(page.number, page.first, len(page.rows)) for page in pages] == [
        (1, 0, PAGE_ROWS),
        (2, PAGE_ROWS, 5),
        (2, PAGE_ROWS, 5),
        (1, 0, PAGE_ROWS),
    ]
    assert pages[1].rows[0].text == f"number {PAGE_ROWS}"


def test_an_address_gives_the_same_query_again(table: SamplesTable) -> None:
    from urllib.parse import parse_qsl

    given = {"q": "a & b=ü", "width_min": "10", "column.score_max": "0.25", "label": "3", "sort": "width"}
    query = Query.parse(given | {"order": "descending"}, table.fields)
    assert Query.parse(dict(parse_qsl(query.address(page=2)[1:])), table.fields) == query


def test_queries_reach_no_file(table: SamplesTable) -> None:
    with (
        table.asking(Query.parse({}, table.fields)) as answers,
        pytest.raises(Exception, match=r"[Pp]ermission|disabled"),
    ):
        answers._ask("SELECT * FROM read_text('/etc/hostname')", [])
