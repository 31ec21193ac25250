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


DIGEST = ' "digest": "2449f949feb38b159c02b880aa15f94ca28f0837b8f14f99bbd44f6f2af57ca4",\n'


def test_a_record_on_disk_is_read_and_written_byte_for_byte(tmp_path: Path) -> None:
    """Records of earlier versions have no digest."""
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
    assert path.read_text() == ON_DISK.replace(' "drops"', f'{DIGEST} "drops"')
    assert run.read_record("samples", "00007") == record
    assert (run.committed_file("samples", "00007").path, record.bytes) == ("store/samples/00007.parquet", 12)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"rows": 3', '"rows": 4'),
        ('"sha256": "ab"', '"sha256": "ac"'),
        ('"input": "i",', ""),
        ('"shard": 7', '"shard": 8'),
        ("}\n", ""),
        (' "counters"', "\x00counters"),
    ],
)
def test_a_record_that_was_changed_is_unfinished_work(old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "state/samples/00007.json"
    path.parent.mkdir(parents=True)
    path.write_text(ON_DISK)
    run = RunFolder(tmp_path)
    record = run.read_record("samples", "00007")
    assert record is not None
    run.write_record(record)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert run.read_record("samples", "00007") is None
    assert list(run.records("samples")) == []
    for other in (b"", b"null", b"[1]", bytes(200), b"\xff"):
        path.write_bytes(other)
        assert run.read_record("samples", "00007") is None


def test_the_record_of_another_shard_is_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_record(Record("samples", 7, "f", "i", input_rows=1, rows=1))
    run.storage.write("state/samples/00008.json", run.storage.read("state/samples/00007.json"))
    run.storage.write("state/images/00007.json", run.storage.read("state/samples/00007.json"))
    assert run.read_record("samples", "00008") is None
    assert run.read_record("images", "00007") is None


def test_a_digest_holds_whatever_json_makes_of_the_values(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    info = {"rows": {10: (1, 2), 9: []}, "nan": float("nan"), "key": "caf\udce9"}
    run.write_record(Record("samples", 7, "f", "i", input_rows=1, rows=1, info=info))
    found = run.read_record("samples", "00007")
    assert found is not None
    assert found.info["rows"] == {"10": [1, 2], "9": []}


def test_a_record_of_several_files_has_no_single_one() -> None:
    files = (CommittedFile("a", 1, ""), CommittedFile("b", 2, ""))
    record = Record("samples", 7, "f", "i", input_rows=1, rows=1, files=files)
    assert record.bytes == 3
    with pytest.raises(AssertionError, match="samples/00007 has 2 files"):
        _ = record.file


def test_names_of_shards_sort_as_their_indices_up_to_five_digits_and_then_grow() -> None:
    assert [shard_name(index) for index in (0, 7, 99_999, 20_000_001)] == ["00000", "00007", "99999", "20000001"]
