"""`source.captions`: sets of captions with weights, from a table to the store, and sets that are added later."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core.store import Store, load_manifest, read_captions, verify_store
from pipeline.config import load_config
from pipeline.errors import ConfigError, StaleOutputError
from pipeline.options import RunOptions
from pipeline.storage.run_folder import RunFolder
from stages.precompute.encode_text import EncodeStage
from tests.commands import call
from tests.image_server import Server, body, serve, status
from tests.images import plain_png
from tests.runs import precompute, store_bytes
from workflows.precompute import Precompute, PrecomputeConfig

LONG = [f"a long caption of image {at}" for at in range(6)]
SHORT: list[Any] = ["zero", "one", None, ["three", "drei"], "", "one"]
HAVE = [["zero"], ["one"], [], ["three", "drei"], [], ["one"]]
BOTH = "source.captions=[{column: long, weight: 0.8}, {column: short, weight: 0.2}]"
SMALL = ("images.sizes_px=[8]", "shard_size=2")
_SECONDS = itertools.count(1)
KINDS = ("urls of parquet", "urls of jsonl", "parquet")


@pytest.fixture
def server() -> Iterator[Server]:
    with serve({f"/{at}.png": body(plain_png((at, 0, 0), 8)) for at in range(6)}) as found:
        yield found


def write(folder: Path, kind: str, server: Server, short: list[Any] | None = SHORT) -> None:
    """A table with images or their URLs; `short`: None leaves the column out."""
    columns: dict[str, list[Any]] = {"long": LONG, "url": [server.url(f"/{at}.png") for at in range(6)]}
    if kind == "parquet":
        columns = {"long": LONG, "image": [plain_png((at, 0, 0), 8) for at in range(6)]}
    if short is not None:
        columns["short"] = short
    if kind == "urls of jsonl":
        rows = [{name: values[at] for name, values in columns.items()} for at in range(6)]
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        if short is not None:
            columns["short"] = [[cell] if isinstance(cell, str) else cell for cell in short]
        pq.write_table(pa.table(columns), folder / "a.parquet")
    for path in folder.glob(
        "a.*"
    ):  # long ago, so that later starts take the notes of the first, and each time another
        os.utime(path, (0, next(_SECONDS)))


def source(folder: Path, kind: str) -> list[str]:
    suffix = "jsonl" if kind == "urls of jsonl" else "parquet"
    download = ["source.download={retries: 0, allow_private_addresses: true}"] if kind.startswith("urls") else []
    return [f"source.kind={kind.partition(' ')[0]}", f"source.path={folder / f'a.{suffix}'}", *SMALL, *download]


def times(out: Path) -> dict[str, int]:
    """When each file of the store and of the records was written, but the manifest."""
    files = [path for part in ("store", "state") for path in (out / part).rglob("*") if path.is_file()]
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in files if p.name not in ("manifest.json",)}


def sets(out: Path) -> list[list[str]]:
    return [sample.caption_sets["short"] for sample in Store.open(out / "store")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_set_that_is_added_to_a_finished_run_is_all_that_is_made(kind: str, server: Server, tmp_path: Path) -> None:
    is_list = kind.startswith("urls")
    write(tmp_path, kind, server, None if is_list else SHORT)
    config, out = source(tmp_path, kind), tmp_path / "run"
    precompute(out, *config, "source.caption_column=long")
    before, bytes_before, requests = times(out), store_bytes(out), server.requests.total()
    if is_list:  # a list of URLs may have a further column now
        write(tmp_path, kind, server)
    summary = precompute(out, *config, BOTH)
    after, bytes_after = times(out), store_bytes(out)
    assert {name for name, at in before.items() if after[name] != at} == set()
    assert all(bytes_after[name] == data for name, data in bytes_before.items() if name != "manifest.json")
    added = {name.split("/")[1] for name in after.keys() - before.keys()}
    assert added == {"captions-short", "text-t5-short", "captions-short.json", "text-t5-short.json"}
    assert server.requests.total() == requests, "nothing is downloaded again"
    assert sets(out) == HAVE
    assert summary["tally"]["groups"]["captions-short"]["counters"] == {
        "captions": 5,
        "distinct_captions": 5,  # of each shard
        "samples_without": 2,
        "unusable_cells": 0,
    }
    assert verify_store(out / "store").ok
    fresh = tmp_path / "fresh"
    precompute(fresh, *config, BOTH)
    assert store_bytes(fresh) == bytes_after, "as if both sets had been there from the beginning"
    assert precompute(out, *config, BOTH)["tally"]["shards_skipped"] == 3
    assert store_bytes(out) == bytes_after


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_a_set_are_those_of_its_captions(kind: str, server: Server, tmp_path: Path) -> None:
    write(tmp_path, kind, server)
    precompute(tmp_path / "run", *source(tmp_path, kind), BOTH)
    config = [*source(tmp_path, kind), "source.caption_column=short", "max_drop_fraction=1"]
    precompute(tmp_path / "alone", *config)
    found = Store.open(tmp_path / "run" / "store")
    assert found.caption_sets == {"long": 0.8, "short": 0.2}
    alone = {sample.key: sample for sample in Store.open(tmp_path / "alone" / "store")}
    assert len(alone) == 4
    for sample in found:
        mine = sample.set_texts["short"]["t5"]
        assert len(mine) == len(sample.caption_sets["short"])
        if mine:
            other = alone[sample.key]
            assert sample.caption_sets["short"] == other.captions
            assert [array.tobytes() for array in mine] == [array.tobytes() for array in other.text["t5"]]
        assert sample.captions == sample.caption_sets["long"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["urls of parquet", "urls of jsonl"])
def test_changed_captions_of_a_set_are_refused_and_only_they_are_made_again(
    kind: str, server: Server, tmp_path: Path
) -> None:
    write(tmp_path, kind, server)
    config, out = source(tmp_path, kind), tmp_path / "run"
    precompute(out, *config, BOTH)
    before = times(out)
    changed = [*SHORT[:2], "two", *SHORT[3:]]
    write(tmp_path, kind, server, changed)
    with pytest.raises(StaleOutputError, match="shard 00001 of captions-short was made from other cells of the col"):
        precompute(out, *config, BOTH)
    assert times(out) == before
    precompute(out, *config, BOTH, restart=True)
    after = times(out)
    names = {name for name in before if after[name] != before[name]}
    of_shard = {f"store/{g}/00001.parquet" for g in ("captions-short", "text-t5-short")}
    assert names == of_shard | {f"state/{g}/00001.json" for g in ("captions-short", "text-t5-short")}
    assert sets(out)[2] == ["two"]
    precompute(out, *config, "source.caption_column=long")  # without the set nobody minds its column
    write(tmp_path, kind, server)
    precompute(out, *config, "source.caption_column=long")


@pytest.mark.slow
def test_rows_that_were_tried_again_before_a_set_was_added_have_its_captions(server: Server, tmp_path: Path) -> None:
    good = dict(server.routes)
    server.routes = {**good, "/1.png": status(404), "/3.png": status(404)}
    write(tmp_path, "urls of jsonl", server)
    config, out = source(tmp_path, "urls of jsonl"), tmp_path / "run"
    assert precompute(out, *config, "source.caption_column=long")["num_samples"] == 4
    server.routes = good
    workflow = Precompute(load_config(PrecomputeConfig, None, [*config, "source.caption_column=long"]))
    workflow.run(str(out), RunOptions("inline", retry_dropped=("http_404",), quiet=True))
    precompute(out, *config, BOTH)
    found = {sample.captions[0]: sample.caption_sets["short"] for sample in Store.open(out / "store")}
    assert found == dict(zip(LONG, HAVE, strict=True))
    assert verify_store(out / "store").ok


def test_a_cell_of_another_type_is_no_caption_and_is_counted(server: Server, tmp_path: Path) -> None:
    write(tmp_path, "urls of jsonl", server, ["zero", 1, {"a": "b"}, ["three", 4], True, "x" * 100_001])
    summary = precompute(tmp_path / "run", *source(tmp_path, "urls of jsonl"), BOTH, "encoders=[]")
    counters = summary["tally"]["groups"]["captions-short"]["counters"]
    assert (counters["samples_without"], counters["unusable_cells"], summary["num_samples"]) == (5, 5, 6)
    assert sets(tmp_path / "run") == [["zero"], [], [], [], [], []]
    line = "5 samples have no caption of this set, 5 of them as the cell is of another type or no valid text"
    steps = dict(Precompute(PrecomputeConfig()).next_steps(RunFolder(str(tmp_path / "run"))))
    assert steps["captions-short"] == line


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_makes_a_set_goes_on_where_it_was(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "urls of parquet", server)
    config = source(tmp_path, "urls of parquet")
    for name in ("killed", "whole"):
        precompute(tmp_path / name, *config, "source.caption_column=long")
    precompute(tmp_path / "whole", *config, BOTH)
    honest, left = EncodeStage.process, [1]

    def process(stage: EncodeStage, task: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        honest(stage, task)

    monkeypatch.setattr(EncodeStage, "process", process)
    with pytest.raises(KeyboardInterrupt):
        precompute(tmp_path / "killed", *config, BOTH)
    made = list((tmp_path / "killed" / "store" / "text-t5-short").iterdir())
    assert len(made) == 1
    at = made[0].stat().st_mtime_ns
    left[0] = 100
    precompute(tmp_path / "killed", *config, BOTH)
    assert left[0] == 98, "the two shards that were missing"
    assert made[0].stat().st_mtime_ns == at
    assert store_bytes(tmp_path / "killed") == store_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_other_weights_change_nothing_but_the_manifest(server: Server, tmp_path: Path) -> None:
    write(tmp_path, "parquet", server)
    config, out = source(tmp_path, "parquet"), tmp_path / "run"
    precompute(out, *config, BOTH)
    before = times(out)
    precompute(out, *config, "source.captions=[{column: long, weight: 0}, {column: short, weight: 3}]")
    assert times(out) == before
    assert Store.open(out / "store").caption_sets == {"long": 0.0, "short": 3.0}
    precompute(out, *config, "source.caption_column=long")  # the set is left as other groups are, and no longer read
    assert times(out) == before
    assert Store.open(out / "store").caption_sets == {"original": 1.0, "short": 0.0}
    precompute(out, *config, "source.caption_column=short", restart=True)  # other samples
    assert not list((out / "store").glob("*-short/*")), "what was made from what is gone is gone too"
    assert verify_store(out / "store").ok


@pytest.mark.slow
def test_tools_show_a_set_and_find_its_damage(server: Server, tmp_path: Path) -> None:
    write(tmp_path, "parquet", server)
    out = tmp_path / "run"
    named = BOTH.replace("column: short", "column: short, name: brief")
    precompute(out, *source(tmp_path, "parquet"), named)
    shown = call("inspect", str(out)).out
    assert "sets of captions: long 0.8, brief 0.2" in shown
    assert "column: short" in shown
    assert json.loads(call("inspect", str(out), "--json").out)["caption_sets"] == {"long": 0.8, "brief": 0.2}
    key = Store.open(out / "store")[3].key
    found = json.loads(call("inspect", str(out), "--key", key, "--json").out)["found"][0]
    assert found["caption_sets"] == {"brief": ["three", "drei"]}
    assert found["groups"]["text-t5-brief"]["rows"] == [0, 1]
    assert "caption of brief  'drei'" in call("inspect", str(out), "--key", key).out
    report = json.loads(call("report", str(out), "--json").out)
    page = Path(report["report"]).read_text()
    assert "brief: drei" in page
    assert "t5, brief" in page
    again = json.loads(call("verify", str(out), "--reencode", "1", "--json").out)
    assert again["reencoded"]["t5"]["captions"] == 6 + 5 + 1, "of both sets, and the empty one"
    path = out / "store" / "captions-brief" / "00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"drei", b"vier"))
    (problem,) = verify_store(out / "store").problems
    assert (problem.file, problem.message[:6]) == ("captions-brief/00001.parquet", "sha256")


@pytest.mark.slow
def test_a_removed_sample_is_erased_from_all_sets(server: Server, tmp_path: Path) -> None:
    write(tmp_path, "urls of parquet", server)
    out, config = tmp_path / "run", source(tmp_path, "urls of parquet")
    precompute(out, *config, BOTH)
    store = Store.open(out / "store")
    keys = [store[3].key, store[5].key]
    assert call("remove", str(out), "--key", keys[0], "--key", keys[1], "--reason", "asked", "--compact").code == 0
    assert verify_store(out / "store").ok
    assert sets(out) == [HAVE[at] for at in (0, 1, 2, 4)]
    (path,) = (out / "store" / "captions-short").glob("00001*")
    assert [row.captions for row in read_captions(path)] == [(), ("", "")]
    manifest = load_manifest(out / "store")
    entry = manifest.file("text-t5-short", 1)
    assert entry is not None
    assert entry.rows == 2
    for file in (out / "store").rglob("*"):
        assert file.is_dir() or not any(word in file.read_bytes() for word in (b"drei", b"three")), file
    assert precompute(out, *config, BOTH)["tally"]["shards_skipped"] == 3
    summary = precompute(out, *config, BOTH.replace("}]", "}, {column: short, name: again, weight: 1}]"))
    counters = summary["tally"]["groups"]["captions-again"]["counters"]
    assert counters["samples_without"] == 2, "erased ones are no samples"
    assert [sample.caption_sets["again"] for sample in Store.open(out / "store")] == sets(out)
    assert verify_store(out / "store").ok


@pytest.mark.slow
def test_a_plan_counts_the_captions_of_all_sets(server: Server, tmp_path: Path) -> None:
    write(tmp_path, "parquet", server)
    config = [*source(tmp_path, "parquet"), "shard_size=6"]
    planned = json.loads(call("plan", "precompute", "--out", str(tmp_path / "run"), "--json", *config, BOTH).out)
    precompute(tmp_path / "run", *config, BOTH)
    sizes = {p.parent.name: p.stat().st_size for p in (tmp_path / "run" / "store").rglob("00000.parquet")}
    bytes_of = {name: group["bytes_to_do"] for name, group in planned["groups"].items()}
    assert abs(bytes_of["text-t5-short"] - sizes["text-t5-short"]) < 0.5 * sizes["text-t5-short"]
    assert bytes_of["captions-short"] > 0
    status_of = call("status", str(tmp_path / "run")).out
    assert "captions-short" in status_of


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("source.captions=[{column: long, weight: -1}]", "weight"),
        ("source.captions=[{column: long, weight: .inf}]", "weight"),
        ("source.captions=[{column: long, weight: 0}, {column: short, weight: 0}]", "all weights are 0"),
        ("source.captions=[{column: long}, {column: short, name: a b}]", "cannot be named 'a b'"),
        ("source.captions=[{column: long}, {column: short, name: long}]", "'long' is there twice"),
        ("source.captions=[{column: long}, {column: short, name: original}]", "names the captions of a store without"),
        ("source.captions=[{column: long}, {column: other}]", "has no column 'other'"),
        ("source.captions=[{column: other}]", "source.captions.0.column: "),
        ("source.captions=[{column: long}, {column: number}]", "column 'number' is of type double, not text"),
    ],
)
def test_what_cannot_be_a_set_is_refused(given: str, message: str, tmp_path: Path) -> None:
    table = {"long": LONG, "short": LONG, "number": [1.0] * 6, "image": [plain_png()] * 6}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ConfigError) as error:
        precompute(tmp_path / "run", *source(tmp_path, "parquet"), given)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_set_goes_with_no_other_caption_column_and_with_sources_of_tables_only(tmp_path: Path) -> None:
    result = call(
        "run", "precompute", "--out", str(tmp_path / "run"), "source.kind=parquet", "source.caption_column=short", BOTH
    )
    assert result.code == 2
    assert (
        "its first set is of the column 'long', but caption_column is 'short'; leave caption_column out" in result.err
    )
    for kind in ("folder", "webdataset"):
        result = call("run", "precompute", "--out", str(tmp_path / "run"), f"source.kind={kind}", BOTH)
        assert result.code == 2
        assert f"for source.kind=urls, parquet and huggingface, not {kind}" in result.err
    clash = ["encoders=[{name: t5, kind: t5, model: tiny-random-t5},{name: t5-short, model: tiny-random-t5}]"]
    result = call("run", "precompute", "--out", str(tmp_path / "run"), "source.kind=parquet", BOTH, *clash)
    assert result.code == 2
    assert "makes text-t5-short, as another encoder or set does" in result.err


@pytest.mark.slow
def test_the_configuration_in_a_run_folder_can_be_given_again(server: Server, tmp_path: Path) -> None:
    write(tmp_path, "parquet", server)
    precompute(tmp_path / "run", *source(tmp_path, "parquet"), BOTH)
    result = call(
        "run", "precompute", "-c", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "run"), "--quiet"
    )
    assert result.code == 0, result.err


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_no_caption_of_a_row_whose_first_caption_is_empty(
    kind: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned_bytes(name: str, short: list[Any]) -> int:
        folder = tmp_path / name
        folder.mkdir()
        write(folder, kind, server, short)
        given = call("plan", "precompute", "--out", str(folder / "run"), "--json", *source(folder, kind), BOTH)
        assert given.code == 0, given.err
        return json.loads(given.out)["groups"]["text-t5-short"]["bytes_to_do"]

    without = planned_bytes("without", [*SHORT[:3], None, *SHORT[4:]])
    assert planned_bytes("all", SHORT) > without
    monkeypatch.setitem(globals(), "LONG", [*LONG[:3], "", *LONG[4:]])
    assert planned_bytes("empty", SHORT) == without
