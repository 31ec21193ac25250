"""What a run knows of the records of an object store, and how few requests that takes."""

import pickle
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage import ObjectStorage
from pipeline.storage.record import CommittedFile, Record, shard_name
from pipeline.storage.record_index import TOGETHER
from pipeline.storage.run_folder import RunFolder

GROUP, SHARDS = "samples", 12
ALL = f"state/{GROUP}/{TOGETHER}"


class Counted(ObjectStorage):
    """Counts what is asked for."""

    def __init__(self, url: str):
        super().__init__(url)
        self.count: Counter[str] = Counter()

    def read(self, name: str) -> bytes:
        self.count["read"] += 1
        return super().read(name)

    def copy(self, name: str) -> Path:
        self.count["copy"] += 1
        return super().copy(name)

    def size(self, name: str) -> int | None:
        self.count["size"] += 1
        return super().size(name)

    def listing(self, folder: str) -> Iterator[tuple[str, int, str]]:
        self.count["listing"] += 1
        return super().listing(folder)

    def publish(self, local: Path, name: str) -> None:
        self.count["publish"] += 1
        super().publish(local, name)


def record(shard: int, rows: int = 3) -> Record:
    file = CommittedFile(f"store/{GROUP}/{shard_name(shard)}.bin", 1, "0" * 64)
    return Record(GROUP, shard, "fingerprint", f"input of {shard}", rows, rows, {"http_404": 1}, (file,))


@pytest.fixture
def url() -> str:
    """A run folder whose workers have committed some shards."""
    url = f"memory://index-{uuid.uuid4().hex}"
    run = RunFolder(ObjectStorage(url))
    for shard in range(SHARDS):
        commit(run, record(shard))
    return url


def commit(run: RunFolder, record: Record) -> None:
    run.storage.write(record.file.path, b"x")
    run.storage.write_text(run.drops_name(GROUP, shard_name(record.shard)), "{}\n")
    run.write_record(record)


def opened(url: str) -> tuple[RunFolder, Counter[str]]:
    storage = Counted(url)
    return RunFolder(storage), storage.count


def save(url: str) -> None:
    run, _ = opened(url)
    with run.indexed():
        assert len(list(run.records(GROUP))) == SHARDS
        assert run.index is not None
        run.index.save()


def test_after_a_run_its_records_take_one_listing_and_one_object(url: str) -> None:
    save(url)
    run, count = opened(url)
    with run.indexed():
        assert list(run.records(GROUP)) == [record(shard) for shard in range(SHARDS)]
        assert [run.size(record(shard).file.path) for shard in range(SHARDS)] == [1] * SHARDS
        assert run.index is not None
        run.index.save()
    assert count == {"listing": 2, "copy": 1}  # the records, and the files; nothing changed, so nothing is written


def test_without_that_object_each_record_is_read_once(url: str) -> None:
    run, count = opened(url)
    with run.indexed():
        assert list(run.records(GROUP)) == list(run.records(GROUP)) == [record(shard) for shard in range(SHARDS)]
    assert count == {"listing": 1, "read": SHARDS}


def test_a_record_that_was_written_since_is_read_by_itself(url: str) -> None:
    save(url)
    RunFolder(ObjectStorage(url)).write_record(record(7, rows=99))
    run, count = opened(url)
    with run.indexed():
        found = {record.shard: record.rows for record in run.records(GROUP)}
    assert found == {**dict.fromkeys(range(SHARDS), 3), 7: 99}
    assert count == {"listing": 1, "copy": 1, "read": 1}


def test_a_damaged_or_missing_record_is_unfinished_work_whatever_the_object_of_all_says(url: str) -> None:
    save(url)
    storage = ObjectStorage(url)
    storage.write(f"state/{GROUP}/00003.json", b"{")
    storage.delete(f"state/{GROUP}/00004.json")
    run, _ = opened(url)
    with run.indexed():
        assert run.read_record(GROUP, "00003") is None
        assert run.read_record(GROUP, "00004") is None
        assert sorted(run.recorded_shards(GROUP)) == [shard for shard in range(SHARDS) if shard != 4]


def test_a_damaged_object_of_all_records_costs_reads_and_is_written_again(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(url)
    whole = ObjectStorage(url).read(ALL)
    for damage in (b"", b"no gzip", whole[: len(whole) // 2]):
        ObjectStorage(url).write(ALL, damage)
        save(url)
        assert ObjectStorage(url).read(ALL) == whole
    assert "each record is read by itself" in caplog.text


def test_what_workers_report_is_known_without_a_request_and_saved_with_its_version(url: str) -> None:
    save(url)
    run, count = opened(url)
    with run.indexed():
        assert run.read_record(GROUP, "00020") is None
        commit(RunFolder(ObjectStorage(url)), record(20))  # as a worker does
        run.note(record(20))
        assert run.read_record(GROUP, "00020") == record(20)
        assert run.index is not None
        run.index.save()
    assert count == {"listing": 2, "copy": 1, "publish": 1}
    run, count = opened(url)
    with run.indexed():
        assert len(list(run.records(GROUP))) == SHARDS + 1
    assert count == {"listing": 1, "copy": 1}


def test_a_record_that_another_wrote_in_place_of_the_reported_one_is_not_saved_as_it(url: str) -> None:
    run, _ = opened(url)
    with run.indexed():
        list(run.records(GROUP))
        run.note(record(20))
        commit(RunFolder(ObjectStorage(url)), record(20, rows=12345))
        assert run.index is not None
        run.index.save()
    run, _ = opened(url)
    with run.indexed():
        assert run.read_record(GROUP, "00020") == record(20, rows=12345)


def test_many_shards_are_deleted_with_their_files_and_lists(url: str) -> None:
    save(url)
    run, count = opened(url)
    with run.indexed():
        run.delete_shards(GROUP, [shard_name(shard) for shard in range(SHARDS)])
        run.delete_shards(GROUP, ["00077"])  # never was: nothing is asked for
        assert list(run.records(GROUP)) == []
        assert run.index is not None
        run.index.save()
    assert count["read"] == count["size"] == 0
    assert list(ObjectStorage(url).walk()) == []


def test_records_are_saved_during_a_run_each_time_their_number_has_grown_by_half(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.record_index._SAVED_AT_LEAST", 4)
    run, count = opened(url)
    with run.indexed():
        index = run.index
        assert index is not None
        for shard in range(100, 103):
            commit(RunFolder(ObjectStorage(url)), record(shard))
            run.note(record(shard))
            index.save_if_due()
        assert count["publish"] == 0
        for shard in range(103, 150):
            commit(RunFolder(ObjectStorage(url)), record(shard))
            run.note(record(shard))
            index.save_if_due()
    assert 2 <= count["publish"] <= 6


def test_a_reader_without_an_index_does_not_take_the_object_of_all_for_a_shard(url: str) -> None:
    save(url)
    assert sorted(RunFolder(ObjectStorage(url)).recorded_shards(GROUP)) == list(range(SHARDS))


def test_workers_get_no_index(url: str) -> None:
    run, _ = opened(url)
    with run.indexed():
        assert run.index is not None
        assert pickle.loads(pickle.dumps(RunFolder(ObjectStorage(url)))).index is None
        assert run.__getstate__()["index"] is None


def test_a_local_folder_has_no_index(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.indexed():
        assert run.index is None
