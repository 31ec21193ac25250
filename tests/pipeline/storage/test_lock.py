"""One run at a time, on a local folder and on S3."""

import errno
import json
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import EXIT_ENVIRONMENT, LockedError, PipelineError
from pipeline.storage import Storage, lock
from pipeline.storage.lock import LEASE, RunLock, is_running
from pipeline.storage.open import open_storage
from pipeline.storage.run_folder import RunFolder
from tests.object_store import ObjectStore, object_store


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, s3: ObjectStore) -> RunFolder:
    return RunFolder(tmp_path / "run" if request.param == "local" else f"{s3.url}/{tmp_path.name}")


def lease_of(run: RunFolder, *, host: str, renewed_s_ago: float) -> None:
    now = time.time()
    lease = {
        "owner": "other",
        "host": host,
        "pid": 7,
        "user": "ann",
        "since": now - 5000,
        "renewed": now - renewed_s_ago,
    }
    run.storage.write(LEASE, json.dumps(lease).encode())


def test_a_second_run_is_refused_with_the_owner_and_its_age(run: RunFolder) -> None:
    lease_of(run, host="node-3", renewed_s_ago=30)
    with pytest.raises(LockedError) as caught, run.lock():
        pass
    assert re.search(
        r"another run is working in this folder: process 7 of ann on node-3, started 50\d\d s ago, last renewal "
        r"\d\d s ago\. .*--take-over",
        str(caught.value),
    )
    assert caught.value.exit_code == 4
    assert is_running(run.storage)


def test_the_folder_is_free_again_after_a_run(run: RunFolder) -> None:
    for _ in range(2):
        with run.lock() as lease:
            lease.check()
            assert is_running(run.storage)
        assert not is_running(run.storage)
        assert run.storage.size(LEASE) is None


def test_a_run_without_a_sign_of_life_is_taken_over(run: RunFolder) -> None:
    lease_of(run, host="node-3", renewed_s_ago=lock.EXPIRE_S + 1)
    assert not is_running(run.storage)
    with run.lock() as lease:
        lease.check()


@pytest.mark.parametrize("data", [b"", b'{"owner": "oth', bytes(40), b"null", b'{"owner": 3}'])
def test_a_lease_that_cannot_be_read_locks_nobody_out(
    data: bytes, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_POLL_S", 0.0)
    run.storage.write(LEASE, data)
    assert not is_running(run.storage)
    with run.lock() as lease:
        lease.check()


def test_of_three_that_meet_an_expired_lease_one_gets_the_folder(
    s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads the expired lease before the first one takes the folder."""
    run = RunFolder(f"{s3.url}/{tmp_path.name}")
    lease_of(run, host="node-3", renewed_s_ago=lock.EXPIRE_S + 1)
    met, refused, has = threading.Barrier(3), [], []
    read, ended = lock.read_lease, threading.Event()

    def read_together(storage: Storage, name: str) -> dict | None:
        found = read(storage, name)
        if not met.broken and found is not None and found["owner"] == "other":
            met.wait(20)
        return found

    def start() -> None:
        own = RunFolder(run.url)
        try:
            with RunLock(own.storage) as lease:
                lease.check()
                has.append(lease.owner)
                ended.wait(20)
        except LockedError as error:
            refused.append(str(error))
            if len(refused) == 2:
                ended.set()

    monkeypatch.setattr(lock, "read_lease", read_together)
    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(has) == 1
    assert len(refused) == 2


def test_a_lease_that_ends_while_another_run_looks_at_it_is_free(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease_of(run, host="node-3", renewed_s_ago=1)
    create = type(run.storage).create

    def ended(storage: Storage, name: str, data: bytes) -> bool:
        monkeypatch.setattr(type(run.storage), "create", create)
        storage.delete(LEASE)
        raise FileNotFoundError(name)  # it was there, and is not any more

    monkeypatch.setattr(type(run.storage), "create", ended)
    with run.lock() as lease:
        lease.check()


def test_a_run_that_was_suspended_while_it_renewed_does_not_get_its_lease_back(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.01)
    with run.lock() as lease:
        replace, late = type(run.storage).replace, threading.Event()

        def suspended(storage: Storage, name: str, data: bytes, version: str) -> bool:
            lease_of(run, host="node-4", renewed_s_ago=0)  # between its look and its write
            done = replace(storage, name, data, version)
            late.set()
            return done

        monkeypatch.setattr(type(run.storage), "replace", suspended)
        assert late.wait(20)
        assert run.storage.read_json(LEASE)["host"] == "node-4"
        with pytest.raises(LockedError, match="node-4"):
            lease.check()


def test_a_run_whose_lease_is_gone_stops_as_another_one_may_have_come_and_ended(run: RunFolder) -> None:
    with run.lock() as lease:
        worker = pickle.loads(pickle.dumps(lease))
        worker.check()
        run.storage.delete(LEASE)
        for one in (lease, worker):
            with pytest.raises(LockedError, match=r"\.lease\.json is gone: another run had it, or it was deleted"):
                one.check()
    assert run.storage.read_json(LEASE) is None


@pytest.mark.parametrize("far", [False, True])
def test_a_run_that_was_suspended_changes_nothing_once_another_had_its_folder(
    far: bool, s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is about to change: the question is asked in one place, not by each caller."""
    run = RunFolder(f"{s3.url}/{tmp_path.name}" if far else tmp_path / "run")
    clock = [1000.0]
    monkeypatch.setattr(lock, "_clock_s", lambda: clock[0])
    other = open_storage(run.url)
    with run.lock() as lease:
        storage = run.storage
        storage.write("there", b"1")
        storage.write_json_lines("lines", [1])
        lease_of(RunFolder(other), host="node-4", renewed_s_ago=0)
        before = {name: other.read(name) for name in other.walk()}
        clock[0] += 30  # as after SIGCONT
        (tmp_path / "file").write_bytes(b"2")
        changes: dict[str, Callable[[], object]] = {
            "write": lambda: storage.write("there", b"2"),
            "create": lambda: storage.create("new", b"2"),
            "replace": lambda: storage.replace("there", b"2", storage.version("there") or ""),
            "write a file": lambda: storage.write_file("there", tmp_path / "file"),
            "write lines": lambda: storage.write_json_lines("lines", [2]),
            "delete": lambda: storage.delete("there"),
            "delete all": lambda: storage.delete_all(["there", "lines"]),
            "delete a folder": lambda: storage.delete_folder("."),
        }
        for name, change in changes.items():
            lease.lost, lease._seen_s = "", 1000.0
            with pytest.raises(LockedError, match="node-4"):
                change()
            assert {name: other.read(name) for name in other.walk() if not name.startswith(".tmp")} == before, name
        with pytest.raises(LockedError):
            lease.check()
    other.delete(LEASE)
    storage.write("there", b"3")


def test_a_step_reads_the_lease_only_if_nobody_has_for_long(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(lock, "_clock_s", lambda: clock[0])
    with run.lock() as lease:
        lease.check_step()
        lease_of(run, host="node-4", renewed_s_ago=0)
        lease.check_step()
        clock[0] += 30  # as after SIGCONT
        with pytest.raises(LockedError, match="node-4"):
            lease.check_step()
        clock[0] -= 30
        with pytest.raises(LockedError, match="node-4"):
            lease.check(1000.0)


def test_a_step_does_not_wait_for_a_store_that_does_not_answer(
    s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_ANSWER_S", 0.01)
    answers = threading.Event()
    with RunFolder(f"{s3.url}/{tmp_path.name}").lock() as lease:
        monkeypatch.setattr(lock, "read_lease", lambda *_: answers.wait(20) and None)
        started = time.monotonic()
        for _ in range(100):
            lease.check_step()
        assert time.monotonic() - started < 5
        answers.set()
        while lease._asking is not None:
            time.sleep(0.01)
        with pytest.raises(LockedError, match="is gone: another run"):
            lease.check_step()


def test_a_lease_from_a_clock_that_is_ahead_ends_if_nobody_renews_it(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "EXPIRE_S", 0.05)
    monkeypatch.setattr(lock, "_POLL_S", 0.01)
    lease_of(run, host="node-3", renewed_s_ago=-86400)
    assert not is_running(run.storage)
    with run.lock() as lease:
        lease.check()


def test_a_lease_from_a_clock_that_is_ahead_holds_if_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    monkeypatch.setattr(lock, "EXPIRE_S", 100.0)
    lease_of(run, host="node-3", renewed_s_ago=-86400)
    monkeypatch.setattr(time, "sleep", lambda _: lease_of(run, host="node-3", renewed_s_ago=-86401))
    with pytest.raises(LockedError, match=r"last renewal in 864\d\d s, by a clock that is ahead"), run.lock():
        pass


def test_the_state_of_a_folder_on_a_read_only_disk_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    run = RunFolder(tmp_path)
    monkeypatch.setattr(lock.FileLock, "acquire", read_only)
    for ago, running in ((1, True), (10_000, False)):
        lease_of(run, host=socket.gethostname(), renewed_s_ago=ago)
        assert is_running(run.storage) is running


def test_a_live_run_can_be_taken_over_on_request_and_then_knows_it(run: RunFolder) -> None:
    lease_of(run, host="node-3", renewed_s_ago=1)
    with run.lock(take_over=True) as lease:
        lease.check()
        lease_of(run, host="node-4", renewed_s_ago=1)
        with pytest.raises(LockedError, match="lost the folder to process 7 of ann on node-4"):
            lease.check()
    assert run.storage.read_json(LEASE)["host"] == "node-4"  # the other one's lease stays


def test_a_living_run_renews_its_lease(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.02)
    with run.lock():
        first = run.storage.read_json(LEASE)
        deadline = time.monotonic() + 20
        while run.storage.read_json(LEASE)["renewed"] == first["renewed"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_killed_run_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pipeline.storage.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).lock():\n    print('locked', flush=True)\n    time.sleep(60)"
    )
    run = RunFolder(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", code, run.url], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(LockedError, match=f"process {process.pid} of .* on {socket.gethostname()}"), run.lock():
            pass
        assert is_running(run.storage)
        process.kill()
    assert not is_running(run.storage)
    with run.lock() as lease:
        lease.check()


def test_the_driver_of_a_run_that_was_taken_over_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.executors.inline import InlineExecutor
    from pipeline.options import RunOptions
    from tests.pipeline.toy import Toy, ToyConfig

    monkeypatch.setattr(lock, "RENEW_S", 0.01)
    run = RunFolder(tmp_path / "run")
    wait = InlineExecutor.wait

    def with_a_thief(executor: InlineExecutor, timeout_s: float) -> list:
        assert executor.run.lease is not None
        deadline = time.monotonic() + 20
        while not executor.run.lease.lost and time.monotonic() < deadline:
            if run.storage.read_json(LEASE)["owner"] != "other":  # a renewal may have come at the same moment
                lease_of(run, host="node-4", renewed_s_ago=1)
            time.sleep(0.01)
        return wait(executor, timeout_s)

    monkeypatch.setattr(InlineExecutor, "wait", with_a_thief)
    workflow = Toy(ToyConfig.model_validate({"toy": {"num_shards": 5}}))
    with pytest.raises(PipelineError, match="node-4") as caught:
        workflow.run(str(tmp_path / "run"), RunOptions("inline", quiet=True))
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert len(list((tmp_path / "run" / "store" / "squares").glob("*"))) <= 1


def test_parts_of_a_run_are_held_at_the_same_time_each_by_one(run: RunFolder) -> None:
    other = RunFolder(run.url)
    with run.lock(part=1), other.lock(part=2):
        assert lock.running_parts(run.storage) == [1, 2]
        assert is_running(run.storage)
        assert lock.describe_holder(run.storage).endswith(", and 1 more")
        with pytest.raises(LockedError, match="working on part 2 of it: process"), RunFolder(run.url).lock(part=2):
            pass
        with pytest.raises(LockedError, match="working on part 1 of it: process"), RunFolder(run.url).lock():
            pass
        assert run.storage.version(LEASE) is None, "who was refused leaves no lease"
    assert lock.running_parts(run.storage) == []
    assert not is_running(run.storage)


def test_a_part_waits_a_little_for_a_run_of_all(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_POLL_S", 0.01)
    with RunFolder(run.url).lock() as lease:
        monkeypatch.setattr(lock, "_PATIENCE_S", 0.0)
        with pytest.raises(LockedError, match="working in this folder"), run.lock(part=3):
            pass
        assert lock.leases_of_parts(run.storage) == []
        monkeypatch.setattr(lock, "_PATIENCE_S", 30.0)
        monkeypatch.setattr(lock, "is_held", _held_twice())
        with run.lock(part=3) as of_part:
            of_part.check()
        lease.check()


def _held_twice() -> Callable[[Storage, str], bool]:
    answers = iter([True, True, False])
    return lambda *_: next(answers)


def test_a_run_of_all_takes_dead_parts_over_and_they_stop(run: RunFolder) -> None:
    name = lock.lease_of_part(7)
    with RunFolder(run.url).lock(part=7) as of_part:
        with run.lock(take_over=True) as lease:
            lease.check()
            assert lock.leases_of_parts(run.storage) == []
        with pytest.raises(LockedError, match=r"parts/00007\.lease\.json is gone"):
            of_part.check()
    assert run.storage.version(name) is None
