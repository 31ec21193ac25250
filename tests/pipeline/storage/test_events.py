"""Events are read as they are added."""

import json
from pathlib import Path

import pytest

from pipeline.storage import LocalStorage
from pipeline.storage.events import EventLog, EventReader, ReplacedError, read_events
from pipeline.storage.open import open_storage
from tests.object_store import object_store


def numbers(reader: EventReader) -> list[object]:
    return [event.get("number") for event in reader.new()]


def test_a_reader_goes_on_where_it_ended(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    reader = EventReader(storage)
    assert numbers(reader) == []
    log = EventLog(storage)
    log.write("task", number=1)
    log.write("task", number=2)
    assert numbers(reader) == [1, 2]
    assert numbers(reader) == []
    log.write("task", number=3)
    assert numbers(reader) == [3]
    log.close()


def test_a_line_that_is_being_written_is_read_once_it_is_complete(tmp_path: Path) -> None:
    file, reader = tmp_path / "events.jsonl", EventReader(LocalStorage(tmp_path))
    line = json.dumps({"number": 1}).encode() + b"\n"
    file.write_bytes(line[:5])
    assert numbers(reader) == []
    file.write_bytes(line)  # the same inode: written on
    assert numbers(reader) == [1]


def test_a_line_that_a_killed_run_left_is_one_damaged_event(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    reader = EventReader(storage)
    (tmp_path / "events.jsonl").write_bytes(b'{"number": 1}\n{"numb')
    assert numbers(reader) == [1]
    log = EventLog(storage)  # of the run that goes on
    log.write("task", number=2)
    log.close()
    assert numbers(reader) == [None, 2]
    assert [event.get("number") for event in read_events(storage)] == [1, None, 2]


def test_bytes_that_are_no_text_and_values_that_are_no_events_are_damaged_events(tmp_path: Path) -> None:
    lines = [b"\xff\xfe", b"[1]", b"17", b"[" * 100_000, b'{"number": 1}']
    (tmp_path / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    storage = LocalStorage(tmp_path)
    assert list(EventReader(storage).new()) == [{}, {}, {}, {}, {"number": 1}] == list(read_events(storage))


@pytest.mark.parametrize("change", ["deleted", "replaced", "shortened"])
def test_a_folder_that_became_another_one_is_noticed(tmp_path: Path, change: str) -> None:
    file, reader = tmp_path / "events.jsonl", EventReader(LocalStorage(tmp_path))
    file.write_text('{"number": 1}\n')
    assert numbers(reader) == [1]
    if change == "deleted":
        file.unlink()
    elif change == "replaced":
        (tmp_path / "other").write_text('{"number": 7}\n{"number": 8}\n')
        (tmp_path / "other").rename(file)
    else:
        file.write_text("")
    with pytest.raises(ReplacedError):
        numbers(reader)


@pytest.mark.slow
def test_of_an_object_store_each_file_of_events_is_read_once() -> None:
    with object_store() as s3:
        storage = open_storage(f"{s3.url}/run")
        reader = EventReader(storage)
        assert numbers(reader) == []
        for number in (1, 2):
            log = EventLog(storage)
            log.write("task", number=number)
            log.close()
        assert numbers(reader) == [1, 2]
        stopped = EventReader(storage)
        assert next(stopped.new())["number"] == 1
        assert numbers(stopped) == [2]
        s3.requests.clear()
        assert numbers(reader) == []
        assert s3.requests.by_kind()["GET"] == 0
        log = EventLog(storage)
        log.write("task", number=3)
        log.close()
        assert numbers(reader) == [3]
        storage.delete_folder("events")
        with pytest.raises(ReplacedError):
            numbers(reader)
