"""`source.where` of folders, tars and datasets: what is left out is in no shard, and is counted."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlglot")

from pipeline.config import load_config
from pipeline.errors import ConfigError
from stages.sources.base import Source
from stages.sources.folder import FolderConfig
from stages.sources.tars import WebdatasetConfig
from stages.sources.tsv import TsvConfig
from tests.stages.sources.reading import read_originals, tar_bytes

SCORES = [1.0, None, 3.5, 2.5, 5.0]
KEPT = [2, 3, 4]
"""Rows whose score is at least 2."""
WHERE = "score >= 2"


def keys(source: Source) -> list[str]:
    source.check()
    found = [row.key for shard in source.shards(2) for row in source.rows_of(shard)]
    assert [row.key for shard in source.shards(2) for row in source.rows_of(shard)] == found
    return found


def table(folder: Path) -> None:
    rows = [{"file": f"{at}.png", "caption": "c", "score": score} for at, score in enumerate(SCORES)]
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "{no json\n")
    for at in range(6):
        (folder / f"{at}.png").write_bytes(b"i")


def test_rows_of_a_folders_table_are_filtered_and_their_images_are_still_named(tmp_path: Path) -> None:
    table(tmp_path)
    source = FolderConfig(path=str(tmp_path), where=WHERE).build()
    assert keys(source) == [*(f"{at}.png" for at in KEPT), ""], "a line that cannot be parsed stays a drop"
    assert source.filtered == 2
    assert source.ignored == {"images that no row of the table names": 1}
    assert source.fingerprint()["where"] == WHERE


def test_samples_of_tars_are_filtered_by_their_json(tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = []
    for at, score in enumerate(SCORES):
        about = [] if score is None else [(f"{at}.json", json.dumps({"score": score}).encode())]
        members += [(f"{at}.jpg", b"i"), (f"{at}.txt", b"c"), *about]
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(members))
    source = WebdatasetConfig(path=str(tmp_path), where=WHERE).build()
    assert keys(source) == [f"{name}/{at}" for name in ("a", "b") for at in KEPT]
    assert source.filtered == 4
    assert all(original.reason is None for original in read_originals(source))
    assert keys(WebdatasetConfig(path=str(tmp_path), where="score IS NULL").build()) == ["a/1", "b/1"]


def test_rows_of_datasets_are_filtered(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from stages.sources.huggingface import HuggingfaceConfig

    rows: list[dict[str, Any]] = [{"image": b"i", "text": "c", "score": score} for score in SCORES]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "d"))
    source = HuggingfaceConfig(path=str(tmp_path / "d"), where=WHERE).build()
    assert keys(source) == [f"{at:09d}" for at in KEPT]
    assert source.filtered == 2
    with pytest.raises(ConfigError, match=r"source.where: .* has no column 'size'; it has: image, text, score"):
        HuggingfaceConfig(path=str(tmp_path / "d"), where="size > 1").build().check()


def test_what_has_no_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"i")
    with pytest.raises(ConfigError, match=r"source.where: is a condition on a table of captions, and .* has none"):
        FolderConfig(path=str(tmp_path), where=WHERE).build().check()
    (tmp_path / "a.tar").write_bytes(tar_bytes([("0.jpg", b"i"), ("0.json", b'{"size": 1}')]))
    with pytest.raises(ConfigError, match=r"the JSON of the first samples of .*a.tar has no column 'score'"):
        WebdatasetConfig(path=str(tmp_path), where=WHERE).build().check()
    with pytest.raises(ConfigError, match="where"):
        load_config(TsvConfig, {"where": WHERE})
