"""`source.sha256_column` and `md5_column`: an image whose bytes are not those that were listed is a counted drop."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from pipeline.stage import Task
from pipeline.storage.run_folder import RunFolder
from stages.precompute.fetch import ORIGINALS, FetchStage
from stages.precompute.originals import OriginalsReader
from stages.sources.parquet import ParquetConfig

IMAGE = b"\x89PNG, or any other bytes"


def outcomes(folder: Path, hashes: list[Any], **settings: Any) -> list[tuple[str | None, str, dict[str, Any]]]:
    """Reason, detail and annotations of rows with the same image and these hashes."""
    rows = pa.table({"image": [IMAGE] * len(hashes), "caption": ["c"] * len(hashes), "hash": hashes})
    pq.write_table(rows, folder / "l.parquet")
    source = ParquetConfig(path=str(folder / "l.parquet"), **settings).build()
    source.check()
    (shard,) = source.shards(100)
    stage = FetchStage(source, "parquet")
    task = Task(RunFolder(folder / "run", frozenset([ORIGINALS])), shard, frozenset([ORIGINALS]))
    stage.setup(task.run)
    stage.process(task)
    (path,) = task.outputs(ORIGINALS).values()
    with OriginalsReader(path) as reader:
        return [(entry.reason, entry.detail, entry.annotations) for entry in reader.entries]


@pytest.mark.parametrize(("column", "hashed"), [("sha256_column", hashlib.sha256), ("md5_column", hashlib.md5)])
def test_other_bytes_than_those_listed_are_the_drop_hash_mismatch(
    column: str, hashed: Callable[[bytes], Any], tmp_path: Path
) -> None:
    right, wrong = hashed(IMAGE).hexdigest(), hashed(b"another image").hexdigest()
    found = outcomes(tmp_path, [right, right.upper(), f" {right}\n", wrong, "no hash", None, ""], **{column: "hash"})
    assert [reason for reason, _, _ in found] == [None, None, None, "hash_mismatch", "hash_mismatch", None, None]
    name = column.removesuffix("_column")
    assert found[3][1] == f"{name} {right}, but '{wrong}' was expected"
    assert all(annotations == {} for _, _, annotations in found)


def test_a_hash_may_be_bytes(tmp_path: Path) -> None:
    hashes = [hashlib.md5(IMAGE).digest(), hashlib.md5(b"another image").digest()]
    assert [reason for reason, _, _ in outcomes(tmp_path, hashes, md5_column="hash")] == [None, "hash_mismatch"]


def test_a_column_that_cannot_hold_hashes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source.md5_column: .*'hash' is of type double, not text"):
        outcomes(tmp_path, [1.5], md5_column="hash")
    with pytest.raises(ConfigError, match=r"source.sha256_column: .* has no column 'sha'"):
        outcomes(tmp_path, ["a"], sha256_column="sha")
