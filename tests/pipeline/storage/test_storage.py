"""The same claims for a local folder and for S3 (moto's server)."""

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EXIT_ENVIRONMENT, EXIT_PREEMPTED, ConfigError, MachineError, UnavailableError
from pipeline.storage import BackgroundTasks, LocalStorage, ObjectStorage, Storage
from pipeline.storage.files import TEMPORARY_MARK
from pipeline.storage.open import open_storage
from pipeline.storage.run_folder import RunFolder
from pipeline.storage.scratch import machine
from tests.commands import call
from tests.object_store import ACCESS_KEY, BUCKET, SECRET_KEY, ObjectStore, object_store


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(params=["local", "file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, s3: ObjectStore) -> Storage:
    place = {"local": str(tmp_path / "run"), "file": f"file://{tmp_path}/run", "s3": f"{s3.url}/{tmp_path.name}/run"}
    return open_storage(place[request.param])


def test_a_file_is_read_as_it_was_written_and_replaced_as_a_whole(storage: Storage) -> None:
    for data in (b"first", b"", b"\0 second"):
        storage.write("state/a.json", data)
        assert storage.read("state/a.json") == data
        assert storage.size("state/a.json") == len(data)


def test_a_part_of_a_file_ends_where_the_file_ends(storage: Storage) -> None:
    data = bytes(range(200))
    storage.write("state/a", data)
    for start, length in ((0, 200), (0, 10), (7, 100), (150, 100), (199, 1), (200, 1), (500, 10), (3, 0)):
        assert storage.read_part("state/a", start, length) == data[start : start + length]
    with pytest.raises(FileNotFoundError):
        storage.read_part("state/b", 0, 1)


def test_what_is_not_there_has_no_size_no_names_and_can_be_deleted(storage: Storage) -> None:
    assert storage.size("state/a") is None
    assert storage.read_json("state/a") is None
    assert list(storage.names("state")) == []
    storage.delete("state/a")
    storage.delete_folder("state")
    with pytest.raises(FileNotFoundError):
        storage.read("state/a")
    with pytest.raises(FileNotFoundError):
        storage.copy("state/a")


def test_a_list_of_values_proves_each_of_its_bytes_and_its_name(tmp_path: Path) -> None:
    storage, values = LocalStorage(tmp_path), [{"path": "a", "bytes": 1}, {"path": "b", "bytes": 2}]
    storage.write_json_lines("input/1.jsonl", values)
    assert list(storage.read_json_lines("input/1.jsonl")) == values
    whole = storage.read("input/1.jsonl")
    damages = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
    damages += [whole[:length] for length in range(len(whole))]
    for data in damages:
        storage.write("input/1.jsonl", data)
        with pytest.raises(ConfigError, match=r"input/1\.jsonl( line \d)?: is damaged \(.*\); restore it"):
            list(storage.read_json_lines("input/1.jsonl"))
    storage.write("input/2.jsonl", whole)
    with pytest.raises(ConfigError, match=r"input/2\.jsonl: is damaged \(was changed since it was written\)"):
        list(storage.read_json_lines("input/2.jsonl"))


def test_a_list_of_an_earlier_version_has_no_digest_and_is_read(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("input/1.jsonl", b'{"path": "a", "bytes": 1}\n')
    assert list(storage.read_json_lines("input/1.jsonl")) == [{"path": "a", "bytes": 1}]


def test_names_are_those_of_the_files_right_in_the_folder(storage: Storage) -> None:
    for name in ("state/b.json", "state/a.json", "state/deep/c.json", "statement/d.json"):
        storage.write(name, b"x")
    assert sorted(storage.names("state")) == ["a.json", "b.json"]
    storage.delete("state/a.json")
    assert sorted(storage.names("state")) == ["b.json"]
    storage.delete_folder("state")
    assert list(storage.names("state/deep")) == []
    assert list(storage.names("statement")) == ["d.json"]


def test_only_the_first_creates_a_file(storage: Storage) -> None:
    storage.write("other", b"")
    answers: list[tuple[bool, bytes]] = []
    start = threading.Barrier(8)

    def create(data: bytes) -> None:
        start.wait()
        answers.append((storage.create("lease", data), data))

    threads = [threading.Thread(target=create, args=(b"%d" % i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [data for first, data in answers if first] == [storage.read("lease")]


def test_a_file_appears_when_it_is_published_and_not_before(storage: Storage) -> None:
    with storage.writing("store/a/00000.parquet") as path:
        path.write_bytes(b"half")
        assert storage.size("store/a/00000.parquet") is None
        assert path.suffix == ".parquet"
        path.write_bytes(b"whole")
    assert storage.read("store/a/00000.parquet") == b"whole"
    assert not path.exists()


def test_a_write_that_fails_leaves_nothing(storage: Storage) -> None:
    path = Path()

    def fail() -> None:
        nonlocal path
        with storage.writing("store/a") as path:
            path.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert storage.size("store/a") is None
    assert not path.exists()


def test_a_copy_has_the_bytes_and_can_be_given_back(storage: Storage) -> None:
    storage.write("store/a.bin", b"bytes")
    copy = storage.copy("store/a.bin")
    assert copy.read_bytes() == b"bytes"
    storage.release(copy)
    assert storage.read("store/a.bin") == b"bytes"


def test_a_copy_for_another_process_reaches_the_same_files(storage: Storage) -> None:
    storage.write("a", b"1")
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"1"


def test_map_keeps_the_order_and_reads_no_further_ahead_than_it_must(storage: Storage) -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = storage.map(lambda number: number * 2, numbers())
    assert [next(results) for _ in range(5)] == [0, 2, 4, 6, 8]
    assert len(taken) <= 5 + 2 * storage.parallel + 1
    assert list(results) == [2 * n for n in range(5, 1000)]


def test_map_hands_on_what_the_function_raises(storage: Storage) -> None:
    def fail(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    with pytest.raises(ValueError, match="three"):
        list(storage.map(fail, range(10)))


@pytest.mark.slow
def test_chores_are_done_when_they_are_finished_and_their_errors_are_not_lost(storage: Storage) -> None:
    for number in range(20):
        storage.write(f"a/{number}", b"")
    background = BackgroundTasks(storage)
    for number in range(200):
        background.do(storage.delete, f"a/{number}")
    background.finish()
    assert list(storage.names("a")) == []

    def fail() -> None:
        raise RuntimeError("not deleted")

    def do_and_finish() -> None:
        background.do(fail)
        background.finish()

    with pytest.raises(RuntimeError, match="not deleted"):
        do_and_finish()


def test_cleaning_removes_half_written_files_and_nothing_else(storage: Storage) -> None:
    storage.write("store/a/00000.txt", b"whole")
    if isinstance(storage, LocalStorage):
        (storage.root / "store" / "a" / f"{TEMPORARY_MARK}x-00001.txt").write_bytes(b"half")
    else:
        dead = storage.new_file("x").parent.parent / f"{machine()}-4194999-x"  # above the largest process id
        dead.mkdir(exist_ok=True)
        (dead / "00001.txt").write_bytes(b"half")
    assert storage.clean() == 1
    assert storage.clean() == 0
    assert storage.read("store/a/00000.txt") == b"whole"


def test_a_large_file_goes_up_in_parts_and_comes_back_whole(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs.core

    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize=None: 5 * 2**20)
    storage = open_storage(f"{s3.url}/parts")
    data = os.urandom(12 * 2**20)
    with storage.writing("store/big") as path:
        path.write_bytes(data)
    assert storage.read("store/big") == data
    import boto3

    head = boto3.client("s3", endpoint_url=s3.endpoint).head_object(Bucket=BUCKET, Key="parts/store/big")
    assert head["ETag"].strip('"').endswith("-3")  # as S3 marks an object of three parts


@pytest.mark.parametrize("version", [None, "1"])
def test_a_local_file_that_is_gone_is_told_from_one_that_another_has_replaced(
    version: str | None, tmp_path: Path
) -> None:
    storage = open_storage(f"memory://{tmp_path.name}")
    assert isinstance(storage, ObjectStorage)
    with pytest.raises(FileNotFoundError):
        storage.replace_file("a", tmp_path / "gone", version)


def test_a_large_file_is_replaced_only_while_it_is_of_its_version(
    s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs.core

    conditions: dict[str, str | None] = {}
    send = s3fs.core._error_wrapper

    async def seen(method: Any, *, kwargs: dict[str, Any], **options: Any) -> Any:
        conditions[method.__name__] = kwargs.get("IfMatch")
        return await send(method, kwargs=kwargs, **options)

    monkeypatch.setattr(s3fs.core, "_error_wrapper", seen)
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize=None: 5 * 2**20)
    monkeypatch.setattr("pipeline.storage.objects._IN_PARTS_BYTES", 10 * 2**20)
    storage = open_storage(f"{s3.url}/versions")
    assert isinstance(storage, ObjectStorage)
    (tmp_path / "big").write_bytes(bytes(12 * 2**20))
    storage.write("a", b"first")
    old = storage.version("a")
    storage.write("a", b"second")
    conditions.clear()
    assert not storage.replace_file("a", tmp_path / "big", old)
    assert "upload_part" not in conditions, "asked before anything is sent"
    now = storage.version("a")
    assert storage.replace_file("a", tmp_path / "big", now)
    assert storage.size("a") == 12 * 2**20
    assert conditions["complete_multipart_upload"] == now, "and by the store when all is there"


@pytest.mark.slow
def test_errors_that_pass_are_not_seen(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagen_core.far.calls.LONGEST_PAUSE_S", 0.01)
    storage = open_storage(f"{s3.url}/errors")
    s3.faults.errors = 0.25
    before = s3.faults.count["error"]
    try:
        for i in range(6):
            assert storage.create(f"a/{i}", b"%d" % i)
            storage.write(f"a/{i}", b"%d!" % i)
            assert storage.read(f"a/{i}") == b"%d!" % i
        assert len(list(storage.names("a"))) == 6
    finally:
        s3.faults.errors = 0.0
    assert s3.faults.count["error"] - before >= 5


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_given_up_on_and_asked_again(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.config import conf

    options = {"config_kwargs": {"read_timeout": 0.3, "retries": {"max_attempts": 1}}}
    monkeypatch.setitem(conf, "s3", options)
    storage = open_storage(f"{s3.url}/stuck")
    s3.faults.slow, s3.faults.slow_s = 0.5, 1.0
    before = s3.faults.count["slow"]
    try:
        storage.write("a", b"bytes")
        assert storage.read("a") == b"bytes"
        assert storage.size("a") == 5
    finally:
        s3.faults.slow = 0.0
    assert s3.faults.count["slow"] > before


def test_a_bucket_that_is_not_there_is_an_error_that_names_it(s3: ObjectStore) -> None:
    storage = open_storage("s3://no-such-bucket/run")
    calls: dict[str, Callable[[], object]] = {
        "written": lambda: storage.write("a", b""),
        "read": lambda: storage.size("a"),
        "listed": lambda: list(storage.names("a")),
    }
    for done, function in calls.items():
        words = f"s3://no-such-bucket/run/a: cannot be {done}: the bucket s3://no-such-bucket does not exist; check"
        with pytest.raises(MachineError, match=words) as caught:
            function()
        assert caught.value.exit_code == EXIT_ENVIRONMENT
    for function in (lambda: list(storage.entries()), lambda: list(storage.walk()), lambda: storage.create("a", b"")):
        with pytest.raises(MachineError, match="the bucket s3://no-such-bucket does not exist"):
            function()
    for function in (lambda: storage.read("a"), lambda: storage.copy("a"), lambda: storage.delete_folder("a")):
        with pytest.raises(MachineError, match="the bucket s3://no-such-bucket does not exist"):
            function()


def test_an_endless_outage_ends_with_an_error_without_secrets(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("imagen_core.far.calls.LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr("imagen_core.far.calls.PATIENCE_S", 0.2)
    storage = open_storage(f"{s3.url}/outage")
    assert isinstance(storage, ObjectStorage)

    def fail(path: str, **_: object) -> bytes:
        raise OSError(f"signed with {os.environ['AWS_SECRET_ACCESS_KEY']} by {os.environ['AWS_ACCESS_KEY_ID']}")

    monkeypatch.setattr(storage._fs, "cat_file", fail, raising=False)
    words = r"outage/a: cannot be read: OSError: signed with <AWS_SECRET_AC.*, also after \d+ tries in 0\.2 s; check"
    with pytest.raises(UnavailableError, match=words) as caught:
        storage.read("a")
    assert caught.value.exit_code == EXIT_PREEMPTED, "the same command can go on later"
    assert "outage/a: not read: OSError: signed with <AWS_SECRET_ACCESS_KEY>" in caplog.text
    assert SECRET_KEY not in str(caught.value) + caplog.text
    assert ACCESS_KEY not in str(caught.value) + caplog.text


def test_a_url_with_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"s3://\.\.\.@bucket/run: holds a user or password") as caught:
        open_storage("s3://key:secret-word@bucket/run")
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("source={kind: urls, path: 's3://key:secret-word@bucket/urls'}", "holds a user or password"),
        ("source={kind: urls, path: 'simplecache::s3://KEY:secret-word/x@bucket/urls'}", "holds a user or password"),
        ("source={kind: urls, path: 'https://h/l.csv?X-Amz-Signature=secret-word'}", "holds a signature"),
        ("encoders.0.model=https://me@hub/x", "holds a user or password"),
        ("execution.resources={'s3://key:secret-word@b': 1}", "holds a user or password"),
        ("images.sizes_px=['https://h/?sig=secret-word']", "holds a signature"),
        ("source.path=[s3://key:secret-word@bucket/x", "not valid YAML"),
    ],
)
def test_credentials_in_urls_of_the_configuration_are_refused_and_not_shown(override: str, why: str) -> None:
    result = call("config", "show", "precompute", override)
    assert result.code == 2
    assert why in result.err
    assert "secret-word" not in result.out + result.err


@pytest.mark.parametrize("command", [("run", "precompute"), ("submit", "precompute", "--out", "/x"), ("stop", "job")])
def test_an_address_with_a_password_is_refused_not_looked_up_and_not_shown(command: tuple[str, ...]) -> None:
    result = call(*command, "--address", "http://me:secret-word@example.invalid:8265")
    assert result.code == 2
    assert "--address: http://...@example.invalid:8265: holds a user or password" in result.err
    assert "secret-word" not in result.out + result.err


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere://x"):
        open_storage("nowhere://x")


def test_other_writers_files_are_seen_at_once(s3: ObjectStore) -> None:
    one, other = open_storage(f"{s3.url}/two"), open_storage(f"{s3.url}/two")
    assert list(one.names("a")) == []
    other.write("a/b", b"1")
    assert list(one.names("a")) == ["b"]
    other.delete("a/b")
    assert one.size("a/b") is None


def test_a_driver_of_a_part_removes_its_own_half_written_files_and_no_others(tmp_path: Path) -> None:
    first, second, all_of_it = (RunFolder(tmp_path) for _ in range(3))
    with first.lock(part=1), second.lock(part=2):
        mine, other = (run.storage.new_file("store/a/00001.txt") for run in (first, second))
        folder = first.storage.new_folder()
        for path in (mine, other):
            path.write_bytes(b"half")
        assert first.storage.clean() == 2
        assert (mine.exists(), folder.exists(), other.exists()) == (False, False, True)
    with all_of_it.lock():
        assert not other.exists()
