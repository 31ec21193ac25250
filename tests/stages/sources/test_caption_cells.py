"""Cells of further columns of captions: aligned with the rows of a shard, and no part of its digest."""

import csv
import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.stage import Shard
from pipeline.storage.run_folder import RunFolder
from stages.sources.incremental import InputBatches
from stages.sources.parquet import ParquetConfig
from stages.sources.urls import UrlsConfig, UrlsSource

ROWS = [
    {
        "url": f"http://example.com/{at}.jpg",
        "caption": f"c{at}",
        "score": at % 3,
        "short": None if at % 5 == 0 else f's "{at}" é',
    }
    for at in range(23)
]
CELLS = [[] if row["short"] is None else [row["short"]] for row in ROWS]
SETS = [{"column": "caption"}, {"column": "short"}]


def write(folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=4)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        with gzip.open(path, "wt", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows({**row, "short": row["short"] or ""} for row in ROWS)
    os.utime(path, (0, 0))
    return path


def source(path: Path, **more: Any) -> UrlsSource:
    found = UrlsConfig.model_validate({"path": str(path), **more}).build()
    found.check()
    return found


def known_shards(found: UrlsSource, folder: Path) -> list[Shard]:
    """As a run finds them that notes its input, and takes the notes of an earlier start."""
    batches = InputBatches(found, RunFolder(str(folder)), 5, "samples")
    batches.begin_run()
    batches.record(restart=False)
    return list(batches.shards())


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv.gz"])
@pytest.mark.parametrize("where", [None, "score < 2"])
def test_cells_are_those_of_the_rows_and_leave_their_digest_alone(
    kind: str, where: str | None, tmp_path: Path
) -> None:
    if where is not None:
        pytest.importorskip("sqlglot")
    path = write(tmp_path / "data", kind)
    plain = list(source(path, caption_column="caption", where=where).shards(5))
    found = source(path, captions=SETS, where=where)
    kept = [at for at, row in enumerate(ROWS) if where is None or row["score"] < 2]
    blank = [[""]] if kind == "csv.gz" else [[]]  # a cell of CSV without text is empty text
    expected = [blank[0] if not CELLS[at] else CELLS[at] for at in kept]
    first = known_shards(found, tmp_path / "run")
    for shards in (list(found.shards(5)), first, known_shards(found, tmp_path / "run")):
        assert [(shard.index, shard.digest) for shard in shards] == [(shard.index, shard.digest) for shard in plain]
        assert [cell for shard in shards for cell in found.caption_cells(shard, "short")] == expected
        arrived = [pickle.loads(pickle.dumps(shard)) for shard in shards]
        assert [cell for shard in arrived for cell in shard.cells("short")] == expected
        assert [row for shard in arrived for row in shard.rows] == [row for shard in plain for row in shard.rows]
    _, _, *noted = map(json.loads, (tmp_path / "run" / "input" / "known.jsonl").read_text().splitlines())
    assert [line[-1] for line in noted] == [shard.cell_digests for shard in first]


def test_a_further_column_that_changes_has_another_digest_and_the_rows_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "data", "jsonl")
    before = list(source(path, captions=SETS).shards(5))
    lines = path.read_text().splitlines()
    lines[7] = lines[7].replace('s \\"7', 's \\"8')
    path.write_text("\n".join(lines))
    after = list(source(path, captions=SETS).shards(5))
    assert [shard.digest for shard in before] == [shard.digest for shard in after]
    same = [a.digest_of("short") == b.digest_of("short") for a, b in zip(before, after, strict=True)]
    assert same == [True, False, True, True, True]


def test_captions_of_images_in_parquet_are_read_without_the_images(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    columns = {"image": [b"x"] * 23, "caption": ["c"] * 23, "short": [row["short"] for row in ROWS]}
    pq.write_table(pa.table({**columns, "more": [{"raw": ["a", "b"]}] * 23}), data / "a.parquet", row_group_size=4)
    pq.write_table(pa.table({name: values[:3] for name, values in columns.items()}), data / "b.parquet")
    found = ParquetConfig.model_validate({"path": str(data / "*.parquet"), "captions": SETS}).build()
    found.check()
    shards = list(found.shards(7))
    assert [cell for shard in shards for cell in found.caption_cells(shard, "short")] == [*CELLS, *CELLS[:3]]
    assert found.caption_cells(shards[0], "more.raw") == [["a", "b"]] * 7
    assert found.caption_cells(shards[0], "more") == [None] * 7
    assert not any(shard.cell_digests for shard in shards), "the digest of the file is that of all its columns"
