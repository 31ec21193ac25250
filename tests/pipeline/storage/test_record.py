"""Completion records, and the JSON they are on disk."""

from pathlib import Path

import pytest

from pipeline.storage.record import CommittedFile, Record, shard_name
from pipeline.storage.run_folder import RunFolder

ON_DISK = """{
 "counters": {
  "captions": 3,
  "cosine_min": 0.5
 },
 "drops": {
  "http_404": 2
 },
 "files": [
  {
   "bytes": 12,
   "path": "store/samples/00007.parquet",
   "sha256": "ab"
  }
 ],
 "fingerprint": "f",
 "group": "samples",
 "info": {
  "captions": 3,
  "excluded_rows": {
   "removed": [
    1
   ]
  }
 },
 "input": "i",
 "input_rows": 5,
 "rows": 3,
 "shard": 7
}
"""


def test_a_record_on_disk_is_read_and_written_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "state/samples/00007.json"
    path.parent.mkdir(parents=True)
    path.write_text(ON_DISK)
    run = RunFolder(tmp_path)
    record = run.read_record("samples", "00007")
    assert record == Record(
        group="samples",
        shard=7,
        fingerprint="f",
        input="i",
        input_rows=5,
        rows=3,
        drops={"http_404": 2},
        files=(CommittedFile("store/samples/00007.parquet", 12, "ab"),),
        counters={"captions": 3, "cosine_min": 0.5},
        info={"captions": 3, "excluded_rows": {"removed": [1]}},
    )
    path.unlink()
    run.write_record(record)
    assert path.read_text() == ON_DISK
    assert (run.committed_file("samples", "00007").path, record.bytes) == ("store/samples/00007.parquet", 12)


def test_a_record_of_several_files_has_no_single_one() -> None:
    files = (CommittedFile("a", 1, ""), CommittedFile("b", 2, ""))
    record = Record("samples", 7, "f", "i", input_rows=1, rows=1, files=files)
    assert record.bytes == 3
    with pytest.raises(AssertionError, match="samples/00007 has 2 files"):
        _ = record.file


def test_names_of_shards_sort_as_their_indices_up_to_five_digits_and_then_grow() -> None:
    assert [shard_name(index) for index in (0, 7, 99_999, 20_000_001)] == ["00000", "00007", "99999", "20000001"]
