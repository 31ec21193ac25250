"""The rows of every kind of source, which the digests of shards are of, and what becomes of each row."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.stage import Task
from pipeline.storage.run_folder import RunFolder
from stages.precompute.fetch import ORIGINALS, FetchStage
from stages.precompute.originals import OriginalsReader
from stages.sources.base import PAYLOAD, Source, SourceRow
from stages.sources.parquet import _footer_digest
from stages.sources.records.cells import BadCell
from tests.image_server import body, serve
from tests.stages.sources.messy_sources import IMAGE, make_sources

EXPECTED = json.loads(Path(__file__).with_name("messy_sources.json").read_text())
"""For each source its rows as JSON, pinned since existing runs compare their digests; and of each row key, reason and
detail of its drop, or key, URL, captions, annotations and size of the image's bytes."""
names = pytest.mark.parametrize("name", EXPECTED)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Source], dict[str, str]]]:
    """The sources, and what the constants of messy_sources.json stand for."""
    data = tmp_path_factory.mktemp("sources") / "data"
    with serve({f"/image/{number}": body(IMAGE) for number in range(10)}) as server:
        sources = make_sources(data, server.url(""))
        yield sources, {"SERVER": server.url(""), "FOOTER": _footer_digest(str(data / "rows_7.parquet"))}


def expected(name: str, what: str, constants: dict[str, str]) -> list[list[object]]:
    text = json.dumps(EXPECTED[name][what])
    for constant, value in constants.items():
        text = text.replace(constant, value)
    return json.loads(text)


@names
def test_the_json_of_the_rows_of_every_source_is_what_it_was(
    name: str, made: tuple[dict[str, Source], dict[str, str]]
) -> None:
    sources, constants = made
    (shard,) = sources[name].shards(100)
    assert shard.rows == expected(name, "rows", constants)


@names
def test_the_fetch_stage_stores_or_drops_every_row_as_before(
    name: str, made: tuple[dict[str, Source], dict[str, str]], tmp_path: Path
) -> None:
    sources, constants = made
    (shard,) = sources[name].shards(100)
    stage = FetchStage(sources[name], name)
    task = Task(RunFolder(tmp_path, frozenset([ORIGINALS])), shard, frozenset([ORIGINALS]))
    stage.setup(task.run)
    stage.process(task)
    (path,) = task.outputs(ORIGINALS).values()
    with OriginalsReader(path) as reader:
        outcomes = [
            [entry.key, entry.reason, entry.detail]
            if entry.reason
            else [entry.key, entry.url, list(entry.captions), entry.annotations, len(reader.data(entry))]
            for entry in reader.entries
        ]
    assert outcomes == expected(name, "outcomes", constants)


@pytest.mark.parametrize("layout", [("key", PAYLOAD), ("key", PAYLOAD, "is_duplicate"), ("key", "url", "annotations")])
def test_a_drop_that_the_driver_found_ends_the_row_and_names_no_content_once_redacted(layout: tuple[str, ...]) -> None:
    payload = (1, "a") if PAYLOAD in layout else ()
    row = SourceRow("k", payload=payload).dropped(BadCell("invalid_line", "line 7 is not JSON"))
    values = json.loads(json.dumps(row.to_json(layout)))
    assert values[-1] == {"drop": ["invalid_line", "line 7 is not JSON"]}
    assert SourceRow.from_json(values, layout) == row
    assert row.redacted().to_json(layout)[-1] == {"drop": ("invalid_line", "")}
    assert SourceRow("k", payload=payload).to_json(layout) == row.to_json(layout)[:-1]
